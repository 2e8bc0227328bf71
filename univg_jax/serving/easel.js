// A picture on which a visitor paints a mask or draws boxes, by mouse, pen or finger.
// Events: `mask` with the mask as a PNG's data URL, white on black, or "" if nothing is painted;
// `boxes` with all boxes as [left, top, right, bottom], in fractions of the picture.
const INK = "#e6007e";
const LONG_SIDE = 512; // of the canvas, in pixels
const LEAST_BOX = 0.04; // a smaller one was a slip of the hand

export default {
  template: `
    <div class="easel" :style="{ aspectRatio: width + ' / ' + height, maxWidth: 'min(100%, ' + 60 * width / height + 'vh)' }">
      <img v-if="src" :src="src" :class="{ pixels: Math.max(width, height) <= 128 }" :alt="alt" draggable="false" />
      <canvas ref="canvas" role="img" :aria-label="hint" :width="size[0]" :height="size[1]"
        :class="'draws-' + mode"
        @pointerdown="begin" @pointermove="go" @pointerup="end" @pointercancel="end"></canvas>
      <span v-if="hint && mode !== 'none' && !touched" class="easel-hint">{{ hint }}</span>
    </div>`,
  props: {
    src: String,
    alt: String,
    hint: String,
    width: Number,
    height: Number,
    mode: String, // none, mask or boxes
    mask: String, // address of a mask to begin with
    boxes: Array,
    colors: Array,
    brush: Number, // diameter, as a fraction of the shorter side
    erases: Boolean,
  },
  data() {
    return { drawing: null, touched: false };
  },
  computed: {
    size() {
      const scale = LONG_SIDE / Math.max(this.width, this.height);
      return [Math.max(1, Math.round(this.width * scale)), Math.max(1, Math.round(this.height * scale))];
    },
  },
  watch: {
    mask() { this.load(); },
    mode() { this.load(); },
    src() { this.load(); },
    boxes: { deep: true, handler() { this.showBoxes(); } },
    size() { this.$nextTick(this.load); },
  },
  mounted() { this.load(); },
  methods: {
    context() { return this.$refs.canvas.getContext("2d", { willReadFrequently: true }); },
    wipe() { this.context().clearRect(0, 0, ...this.size); },
    load() {
      this.wipe();
      this.touched = false;
      if (this.mode === "boxes") this.showBoxes();
      if (this.mode !== "mask" || !this.mask) return;
      const picture = new Image();
      const address = this.mask;
      picture.onload = () => {
        if (address !== this.mask || this.mode !== "mask") return;
        this.wipe();
        this.touched = true;
        const ink = this.context();
        ink.imageSmoothingEnabled = false;
        ink.drawImage(picture, 0, 0, ...this.size);
        const pixels = ink.getImageData(0, 0, ...this.size);
        const [r, g, b] = [1, 3, 5].map((i) => parseInt(INK.slice(i, i + 2), 16));
        for (let i = 0; i < pixels.data.length; i += 4) {
          pixels.data.set(pixels.data[i] > 127 ? [r, g, b, 255] : [0, 0, 0, 0], i);
        }
        ink.putImageData(pixels, 0, 0);
      };
      picture.src = address;
    },
    clear() {
      this.wipe();
      this.touched = false;
      this.$emit("mask", "");
    },
    place(event) {
      const area = this.$refs.canvas.getBoundingClientRect();
      const inside = (x) => Math.min(1, Math.max(0, x));
      return [inside((event.clientX - area.left) / area.width), inside((event.clientY - area.top) / area.height)];
    },
    begin(event) {
      if (this.mode === "none" || event.button > 0) return;
      this.$refs.canvas.setPointerCapture(event.pointerId);
      this.drawing = this.place(event);
      this.touched = true;
      if (this.mode === "mask") this.stroke(this.drawing, this.drawing);
    },
    go(event) {
      if (!this.drawing) return;
      const here = this.place(event);
      if (this.mode === "mask") {
        this.stroke(this.drawing, here);
        this.drawing = here;
      } else {
        this.showBoxes();
        this.fill(this.between(this.drawing, here), this.boxes.length);
      }
    },
    end(event) {
      if (!this.drawing) return;
      const box = this.between(this.drawing, this.place(event));
      this.drawing = null;
      if (this.mode === "mask") this.$emit("mask", this.painted());
      else if (box[2] - box[0] >= LEAST_BOX && box[3] - box[1] >= LEAST_BOX && this.boxes.length < this.colors.length) {
        this.$emit("boxes", [...this.boxes, box]);
      } else this.showBoxes();
    },
    stroke([x0, y0], [x1, y1]) {
      const [width, height] = this.size;
      const ink = this.context();
      ink.globalCompositeOperation = this.erases ? "destination-out" : "source-over";
      ink.strokeStyle = INK;
      ink.lineCap = ink.lineJoin = "round";
      ink.lineWidth = this.brush * Math.min(width, height);
      ink.beginPath();
      ink.moveTo(x0 * width, y0 * height);
      ink.lineTo(x1 * width + 0.01, y1 * height);
      ink.stroke();
      ink.globalCompositeOperation = "source-over";
    },
    painted() {
      const own = this.$refs.canvas;
      const data = this.context().getImageData(0, 0, ...this.size).data;
      if (!data.some((value, i) => i % 4 === 3 && value > 127)) return "";
      const copy = Object.assign(document.createElement("canvas"), { width: own.width, height: own.height });
      const mask = copy.getContext("2d");
      mask.drawImage(own, 0, 0);
      mask.globalCompositeOperation = "source-in";
      mask.fillStyle = "white";
      mask.fillRect(0, 0, own.width, own.height);
      mask.globalCompositeOperation = "destination-over";
      mask.fillStyle = "black";
      mask.fillRect(0, 0, own.width, own.height);
      return copy.toDataURL("image/png");
    },
    between([x0, y0], [x1, y1]) {
      return [Math.min(x0, x1), Math.min(y0, y1), Math.max(x0, x1), Math.max(y0, y1)];
    },
    showBoxes() {
      if (this.mode !== "boxes") return;
      this.wipe();
      this.boxes.forEach((box, k) => this.fill(box, k));
      if (this.boxes.length) this.touched = true;
    },
    fill([left, top, right, bottom], k) {
      const [width, height] = this.size;
      const ink = this.context();
      ink.fillStyle = this.colors[k] || "transparent";
      ink.fillRect(left * width, top * height, (right - left) * width, (bottom - top) * height);
    },
  },
};
