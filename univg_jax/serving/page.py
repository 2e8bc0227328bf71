"""The page: NiceGUI's elements around a `Maker`, and a picture to draw on (`easel.js`).

Each visitor has a `_Page` of their own. Nothing is loaded from elsewhere or sent there.
"""

import dataclasses
import random
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.renderings import PALETTE
from data_pipelines.tasks import TASKS
from univg_jax import images
from univg_jax.errors import UserError, check_name, needs_extra
from univg_jax.serving.form import (
    MAX_GUIDANCE,
    MAX_MARGIN,
    MAX_SIDE,
    MAX_STEPS,
    SIDES,
    Form,
    fields_of,
)
from univg_jax.serving.maker import Job, Made, Maker, Stopped
from univg_jax.serving.store import MAX_UPLOAD, check_upload, read_mask, read_upload
from univg_jax.settings import MAX_SEED, SOLVERS

with needs_extra("demo", "the page"):
    import uvicorn
    from fastapi import FastAPI, Request, Response
    from nicegui import app, events, run, ui

MEDIA = {".png": "image/png", ".npy": "application/octet-stream", ".json": "application/json"}
SHARED = ("image", "face", "steps", "solver", "seed")  # what stays when another task is chosen
COLORS = [f"rgb{rgb}" for rgb in PALETTE.values()]
PIXELATED = 128  # a picture of fewer pixels a side shows them


def serve(
    maker: Maker,
    examples: Mapping[str, Sequence[Form]],
    *,
    listening: socket.socket,
    title: str,
    seed: int = 0,
) -> None:
    """Serves the page until the process is ended.

    `title` says which model it is, and `seed` is the first one of a visitor.
    """

    @app.get("/file/{name}")
    def file(name: str) -> Response:
        try:
            data = maker.store.read(name)
        except UserError as error:
            return Response(str(error), status_code=404)
        headers = {"Cache-Control": "private, max-age=31536000, immutable"}
        return Response(data, media_type=MEDIA[Path(name).suffix], headers=headers)

    @ui.page("/")
    def index(request: Request) -> None:
        _Page(maker, examples, title=title, seed=seed).begin(dict(request.query_params))

    around = FastAPI(openapi_url=None)
    ui.run_with(
        around,
        title=title,
        favicon="🎨",
        language="en-US",
        show_welcome_message=False,
        reconnect_timeout=120.0,  # a phone that slept finds its page again
    )
    config = uvicorn.Config(around, log_level="warning", ws="wsproto", timeout_graceful_shutdown=3)
    uvicorn.Server(config).run(sockets=[listening])


class Easel(ui.element, component="easel.js"):
    """A picture, or a gray canvas, on which a visitor paints a mask or draws boxes."""

    def __init__(self, *, on_mask: Callable[[str], Any], on_boxes: Callable[[list], Any]):
        super().__init__()
        self.on("mask", lambda event: on_mask(event.args))
        self.on("boxes", lambda event: on_boxes(event.args))
        self.props.update(colors=COLORS, brush=0.15, erases=False)

    def show(
        self,
        *,
        width: int,
        height: int,
        mode: str,
        src: str = "",
        mask: str = "",
        boxes: Sequence[Sequence[float]] = (),
        hint: str = "",
    ) -> None:
        """Begins anew. `mode` is none, mask or boxes; `src` and `mask` are addresses."""
        self.props.update(src=src, width=width, height=height, mode=mode, mask=mask, hint=hint)
        self.props.update(boxes=[list(box) for box in boxes])
        self.update()
        self.run_method("load")

    def set(self, name: str, value: object) -> None:
        """Changes the brush or the eraser."""
        self.props[name] = value
        self.update()


class _Page:
    """What one visitor sees, and has filled in."""

    def __init__(
        self, maker: Maker, examples: Mapping[str, Sequence[Form]], *, title: str, seed: int
    ):
        self.maker, self.examples = maker, examples
        self.values: dict[str, Any] = {"seed": seed}  # of the form that is shown
        self.drafts: dict[str, dict[str, Any]] = {}  # of other tasks, by name
        self.job: Job | None = None
        ui.add_css(Path(__file__).with_name("page.css").read_text())
        ui.colors(primary="#3b4cca")
        with ui.element("main").classes("page"):
            with ui.element("header"):
                ui.label("univg").classes("name")
                ui.label(title).classes("quiet")
            with ui.element("section").classes("form"):
                with ui.element("nav").classes("chips"):
                    self.chips = {name: self._chip(name) for name in maker.pipeline.tasks}
                self.inputs = ui.element("div").classes("inputs")
                self.error = ui.label().classes("error").props('role="alert"')
                with ui.element("div").classes("go"):
                    self.button = ui.button("Make the picture", on_click=self._make)
                    self.button.props("no-caps unelevated")
                    self.stop = ui.button("Stop", on_click=self._stop).props("no-caps outline")
                self.bar = ui.linear_progress(value=0, show_value=False).props("rounded")
                self.doing = ui.label().classes("quiet").props('role="status"')
            self.gallery = ui.element("section").classes("gallery")
            with self.gallery:
                self.empty = ui.label("Your pictures will be here.").classes("empty quiet")
            self.row = ui.element("section").classes("examples")
        ui.timer(0.2, self._show_progress)
        ui.context.client.on_delete(self._stop)

    def _chip(self, task: str) -> ui.button:
        chip = ui.button(_label(task), on_click=lambda: self._choose(task))
        return chip.props("rounded dense no-caps unelevated")

    # Which form is shown.

    def begin(self, query: Mapping[str, str]) -> None:
        """Shows the form of a link, or a blank one."""
        tasks = self.maker.pipeline.tasks
        try:
            form = Form.of_query(query) if query else Form(task=tasks[0], seed=self.values["seed"])
            check_name(form.task, tasks, what="task of this model:")
            self._fill(form)
        except UserError as error:
            self._choose(tasks[0])
            self._say(f"This link cannot be used: {error}")

    def _choose(self, task: str) -> None:
        """Shows a task, with what was filled in before."""
        if task == self.values.get("task"):
            return
        if "task" in self.values:
            self.drafts[self.values["task"]] = dict(self.values)
        draft = self.drafts.get(task) or self._blank(task)
        shared = {name: self.values[name] for name in SHARED if name in self.values}
        if draft.get("mask") and shared.get("image") != draft["image"]:
            draft["mask"] = ""
        self.values = {**draft, **shared}
        self._build()

    def _fill(self, form: Form) -> None:
        """Shows a form; where it says nothing, the run's settings."""
        given = {name: getattr(form, name) for name in fields_of(form.task)}
        given = {name: value for name, value in given.items() if value is not None}
        self.values |= self._blank(form.task) | given
        if form.boxes:
            self.values["boxes"] = [dataclasses.asdict(box) for box in form.boxes]
        self._build()

    def _blank(self, task: str) -> dict[str, Any]:
        """The values of a form with the run's settings."""
        form, config = Form(task=task), self.maker.pipeline.config
        scales = config.sampling.guidance.get(task)
        run_has = {
            "guidance": scales and scales.text,
            "image_guidance": scales and scales.image,
            "steps": min(config.sampling.steps, MAX_STEPS),
            "solver": config.sampling.solver,
            "width": config.data.resolution,
            "height": config.data.resolution,
            "boxes": [],
        }
        values = {name: run_has.get(name, getattr(form, name)) for name in fields_of(task)}
        # A scale of 1 is the same as none.
        return {name: 1.0 if value is None else value for name, value in values.items()}

    def _form(self) -> Form:
        """What is filled in. Raises UserError for what cannot be."""
        values = {name: self.values[name] for name in fields_of(self.values["task"])}
        for name in ("guidance", "image_guidance"):
            if values.get(name) == 1 and self._blank(values["task"])[name] == 1:
                values[name] = None
        if "face" in values and not values["face"]:
            raise UserError("Choose a picture of the person first.")
        if "image" in values and not values["image"]:
            raise UserError("Choose a picture first.")
        if "mask" in values and not (values["mask"] or any(values["margins"])):
            raise UserError(
                "Nothing is painted: paint what is to be made anew, or make the picture larger."
            )
        if "boxes" in values and not values["boxes"]:
            raise UserError("No block is drawn: drag on the canvas to draw one.")
        for k, box in enumerate(values.get("boxes", ())):
            if not box["name"].strip():
                color = list(PALETTE)[k]
                raise UserError(f"Say what stands in the {color} block, as the prompt says it.")
        return Form.of(values)

    # Its inputs.

    def _build(self) -> None:
        """Makes the form anew, without pictures that are not there any more."""
        task = TASKS[self.values["task"]]
        self._say("")
        for name in ("image", "mask", "face"):
            if (file := self.values.get(name)) and file not in self.maker.store:
                self.values[name] = ""
                self._say("A picture of this form is not here any more: choose it again.")
        for name, chip in self.chips.items():
            is_chosen = name == task.name
            chip.props.update({"outline": not is_chosen, "aria-pressed": str(is_chosen).lower()})
            chip.update()
        self.inputs.clear()
        with self.inputs:
            ui.label(task.title[0].upper() + task.title[1:]).classes("title")
            if "boxes" in self.values:
                self._build_layout()
            for name in ("image", "face"):
                if name in fields_of(task.name):
                    self._build_picture(name)
            if "prompt" in fields_of(task.name):
                says = task.prompt_says if "boxes" not in self.values else "what to paint"
                example = task.prompt_example.replace(" (red block)", "")
                ui.textarea(
                    f"Prompt: {says}",
                    placeholder=example,
                    value=self.values["prompt"],
                    on_change=self._keep("prompt"),
                ).props("outlined autogrow stack-label")
            self._build_settings()
        self._build_examples()

    def _build_picture(self, name: str) -> None:
        """The upload of a picture, and the picture, on which a mask may be painted."""

        async def take(event: events.UploadEventArguments) -> None:
            upload.reset()
            self._say("")
            try:
                check_upload(event.file.name, event.file.size())
                pixels = await run.io_bound(read_upload, event.file.name, await event.file.read())
            except UserError as error:
                self._say(str(error))
                return
            self.values[name] = self.maker.store.add_picture(pixels)
            if "mask" in self.values:
                self.values["mask"] = ""
            show()

        def show() -> None:
            self.easel.set_visibility(bool(self.values[name]))
            if self.values[name]:
                height, width = images.size_of(self.maker.store.read(self.values[name]))
                self.easel.show(
                    width=width,
                    height=height,
                    mode="mask" if paints else "none",
                    src=_address(self.values[name]),
                    mask=_address(self.values["mask"]) if paints else "",
                    hint="Paint over what is to be made anew" if paints else "",
                )

        paints = "mask" in fields_of(self.values["task"])
        most = f"{MAX_UPLOAD / 2**20:.0f} MB"
        upload = ui.upload(
            label=f"Choose or drop a picture{' of the person' if name == 'face' else ''}",
            auto_upload=True,
            max_file_size=MAX_UPLOAD,
            on_upload=take,
            on_rejected=lambda: self._say(f"That is no picture, or one of more than {most}."),
        ).props('accept="image/*" flat bordered')
        self.easel = Easel(on_mask=self._take_mask, on_boxes=lambda _: None)
        if paints:
            self._build_mask_tools()
        show()

    def _build_mask_tools(self) -> None:
        with ui.element("div").classes("tools"):
            ui.label("Brush")
            ui.slider(
                min=0.03,
                max=0.4,
                step=0.01,
                value=0.15,
                on_change=lambda event: self.easel.set("brush", event.value),
            ).props('aria-label="size of the brush"')
            ui.checkbox("Eraser", on_change=lambda event: self.easel.set("erases", event.value))
            clear = ui.button("Clear", on_click=lambda: self.easel.run_method("clear"))
            clear.props("flat dense no-caps")
        with ui.expansion("Or make the picture larger").props("dense").classes("more"):
            ui.label("What is added to each side, in percent. The mask does not count then.")
            with ui.element("div").classes("four"):
                for k, side in enumerate(SIDES):
                    ui.number(
                        side,
                        value=self.values["margins"][k],
                        min=0,
                        max=MAX_MARGIN,
                        on_change=lambda event, k=k: self._set_margin(k, event.value),
                    ).props("outlined dense suffix=%")

    def _set_margin(self, side: int, percent: float | None) -> None:
        margins = list(self.values["margins"])
        margins[side] = int(percent or 0)
        self.values["margins"] = tuple(margins)

    async def _take_mask(self, address: str) -> None:
        """Keeps the mask that the browser sent; "" is none."""
        try:
            mask = await run.io_bound(read_mask, address) if address else None
        except UserError as error:
            self._say(str(error))
            return
        self.values["mask"] = "" if mask is None else self.maker.store.add_picture(mask)

    def _build_layout(self) -> None:
        ui.label("Drag to draw a block, and say what stands in it, as the prompt does.")
        self.easel = Easel(on_mask=lambda _: None, on_boxes=self._take_boxes)
        self.rows = ui.element("div").classes("rows")
        self._show_boxes()

    def _show_boxes(self) -> None:
        boxes = self.values["boxes"]
        self.easel.show(
            width=int(self.values["width"] or 1),
            height=int(self.values["height"] or 1),
            mode="boxes",
            boxes=[[box[side] for side in SIDES] for box in boxes],
            hint="Drag to draw a block",
        )
        self.rows.clear()
        with self.rows:
            for k, (box, color) in enumerate(zip(boxes, PALETTE, strict=False)):
                with ui.element("div").classes("box"):
                    ui.element("span").classes("dot").style(f"background: {COLORS[k]}")
                    ui.input(
                        f"what stands in the {color} block",
                        value=box["name"],
                        on_change=lambda event, box=box: box.update(name=event.value),
                    ).props("outlined dense")
                    drop = ui.button(icon="close", on_click=lambda k=k: self._drop_box(k))
                    drop.props(f'flat dense round aria-label="remove the {color} block"')

    def _take_boxes(self, corners: list) -> None:
        boxes = self.values["boxes"]
        for new in corners[len(boxes) : len(COLORS)]:
            boxes.append({"name": ""} | dict(zip(SIDES, (round(x, 3) for x in new), strict=True)))
        self._show_boxes()

    def _drop_box(self, k: int) -> None:
        del self.values["boxes"][k]
        self._show_boxes()

    def _build_settings(self) -> None:
        """Guidance, steps, seed and size, and what few change."""
        shown = fields_of(self.values["task"])
        if "guidance" in shown:
            self._slider("guidance", "Guidance", 1, 10, 0.5)
            if "image_guidance" in shown:
                self._slider("image_guidance", "Image guidance", 1, 5, 0.1)
            ui.label("A guidance of 1 is none.").classes("quiet small")
        self._slider("steps", "Steps", 1, MAX_STEPS // 2, 1)
        with ui.element("div").classes("seed"):
            seed = self._number("seed", "Seed", 0, MAX_SEED)
            dice = ui.button(
                icon="casino", on_click=lambda: seed.set_value(random.randrange(2**16))
            )
            dice.props('flat round aria-label="another seed"').tooltip("another seed")
            if "width" in shown:
                self._number("width", "Width", 8, MAX_SIDE)
                self._number("height", "Height", 8, MAX_SIDE)
        with ui.expansion("More").props("dense").classes("more"):
            ui.select(
                list(SOLVERS),
                label="Solver",
                value=self.values["solver"],
                on_change=self._keep("solver"),
            ).props("outlined dense")
            if "negative_prompt" in shown:
                ui.input(
                    "What to avoid (negative prompt)",
                    value=self.values["negative_prompt"],
                    on_change=self._keep("negative_prompt"),
                ).props("outlined dense")

    def _slider(self, name: str, label: str, least: float, most: float, step: float) -> None:
        """A slider with its value as a number, which may lie beyond the slider's end."""
        limit = MAX_STEPS if name == "steps" else MAX_GUIDANCE
        with ui.element("div").classes("slider"):
            ui.label(label).classes("what")
            slider = ui.slider(min=least, max=most, step=step).props(f'aria-label="{label}"')
            number = ui.number(
                value=self.values[name], min=0, max=limit, step=step, on_change=self._keep(name)
            ).props(f'dense borderless aria-label="{label}"')
            slider.bind_value(number)

    def _number(self, name: str, label: str, least: int, most: int) -> ui.number:
        return ui.number(
            label,
            value=self.values[name],
            min=least,
            max=most,
            precision=0,
            on_change=self._keep(name),
        ).props("outlined dense")

    def _keep(self, name: str) -> Callable[[events.ValueChangeEventArguments], None]:
        """What an element does with a new value."""

        def keep(event: events.ValueChangeEventArguments) -> None:
            self.values[name] = event.value
            if name in ("width", "height") and "boxes" in fields_of(self.values["task"]):
                self._show_boxes()  # on a canvas of that shape

        return keep

    def _build_examples(self) -> None:
        """Buttons that fill in the form."""
        self.row.clear()
        if not (forms := self.examples.get(self.values["task"])):
            return
        with self.row:
            ui.label("Examples").classes("title")
            with ui.element("div").classes("cards"):
                for number, form in enumerate(forms, 1):
                    card = ui.element("button").classes("example")
                    card.on("click", lambda form=form: self._fill(form))
                    with card:
                        if file := form.image or form.face:
                            self._picture(file, "")
                        elif form.boxes:
                            _sketch(form)
                        ui.label(form.prompt or f"Example {number}")

    # Making.

    async def _make(self) -> None:
        """Makes the picture of the form, and shows it."""
        if self.job is not None:
            return
        self._say("")
        try:
            job = self.job = Job(self._form())
            made = await self.maker.make(job)
        except UserError as error:
            self._say(str(error))
        except Stopped:
            pass
        except Exception:  # the log has it
            self._say("The model failed. What happened is in the log of `univg demo`.")
        else:
            ui.navigate.history.replace(f"/?{made.form.query()}")
            self._show(made)
        finally:
            self.job = None

    def _stop(self) -> None:
        if self.job is not None:
            self.job.is_stopped = True

    def _say(self, line: str) -> None:
        """Shows one line of what is wrong, where it can be seen; "" is nothing."""
        self.error.set_text(line)
        self.error.set_visibility(bool(line))
        if line:
            ui.run_javascript(
                f"getHtmlElement({self.error.id}).scrollIntoView("
                "{behavior: 'smooth', block: 'nearest'})"
            )

    def _show_progress(self) -> None:
        job = self.job
        self.button.set_enabled(job is None)
        for element in (self.stop, self.bar, self.doing):
            element.set_visibility(job is not None)
        if job is None:
            return
        self.bar.set_value(job.step / job.total if job.total else 0)
        if not job.has_begun:
            before = self.maker.before(job)
            self.doing.set_text(f"Waiting: {before} before it")
        elif job.total == 0:
            self.doing.set_text("Preparing; the first picture of a kind takes longer")
        else:
            self.doing.set_text(f"Step {job.step} of {job.total}")

    # The gallery.

    def _show(self, made: Made) -> None:
        """Puts a picture first in the gallery, with what it was made of and a link to its form."""
        self.empty.set_visibility(False)
        form, link = made.form, f"/?{made.form.query()}"
        with self.gallery:
            card = ui.element("article")
        card.move(target_index=0)
        with card:
            with ui.element("div").classes("pictures"):
                self._picture(made.picture, "the picture").classes("made")
                for what, file in made.shown.items():
                    with ui.element("div"):
                        self._picture(file, what)
                        ui.label(what).classes("quiet small")
            if form.prompt:
                ui.label(form.prompt).classes("prompt")
            if made.note:
                ui.label(made.note).classes("small")
            ui.label(_settings(form)).classes("quiet small")
            with ui.element("div").classes("links"):
                ui.link("Link", link, new_tab=True).tooltip("opens the page with these settings")
                _save("Save", made.picture)
                if made.answer:
                    _save("Save answer", made.answer)
                again = ui.button("Reuse", on_click=lambda: self._fill(form))
                again.props("flat dense no-caps")
                if takers := self._takers():
                    use = ui.button("Use as input", on_click=lambda: self._use(made.picture))
                    use.props("flat dense no-caps").tooltip(f"as the picture to {takers[0]}")
        ui.run_javascript(
            f"const card = getHtmlElement({card.id}), top = card.getBoundingClientRect().top;"
            "if (top < 0 || top > innerHeight * 0.7)"
            " card.scrollIntoView({behavior: 'smooth', block: 'center'});"
        )

    def _takers(self) -> list[str]:
        """The tasks that take a picture, the one that is shown first."""
        takers = [name for name in self.maker.pipeline.tasks if "image" in fields_of(name)]
        return sorted(takers, key=lambda name: name != self.values["task"])

    def _use(self, file: str) -> None:
        """Makes a picture of the gallery the picture of the form."""
        self.values["image"] = file
        if (task := self._takers()[0]) != self.values["task"]:
            self._choose(task)
            return
        if "mask" in fields_of(task):
            self.values["mask"] = ""
        self._build()

    def _picture(self, file: str, alt: str) -> ui.element:
        """A picture of the store; a small one shows its pixels."""
        height, width = images.size_of(self.maker.store.read(file))
        element = ui.element("img").classes("pixels" if max(height, width) <= PIXELATED else "")
        element.props.update(src=_address(file), alt=alt, width=width, height=height)
        return element


def _sketch(form: Form) -> None:
    """The blocks of a layout, small."""
    blocks = "".join(
        f'<rect x="{box.left}" y="{box.top}" width="{box.right - box.left}" '
        f'height="{box.bottom - box.top}" fill="{color}" />'
        for box, color in zip(form.boxes, COLORS, strict=False)
    )
    svg = f'<svg viewBox="0 0 1 1"><rect width="1" height="1" fill="gray" />{blocks}</svg>'
    ui.html(svg, sanitize=False).classes("sketch")


def _save(text: str, file: str) -> None:
    """A link that saves a file."""
    link = ui.link(text, _address(file))
    link.props.update(download=file)


def _address(file: str) -> str:
    return f"/file/{file}" if file else ""


def _label(task: str) -> str:
    """What a task's button says: a verb, where the task has one."""
    found = TASKS[task]
    return (found.aliases[0] if found.aliases else found.name).capitalize()


def _settings(form: Form) -> str:
    """The settings of a form in one line."""
    said = {
        "seed": form.seed,
        "steps": form.steps,
        "solver": form.solver,
        "guidance": form.guidance,
        "image guidance": form.image_guidance,
        "size": f"{form.width} x {form.height}" if form.width and form.height else None,
        "without": form.negative_prompt,
    }
    return " · ".join(
        [_label(form.task), *(f"{k} {v}" for k, v in said.items() if v not in (None, ""))]
    )
