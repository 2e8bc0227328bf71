"""All tasks of a UniVG model in PyTorch. `univg export --format=diffusers` writes this file.

    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(DIR, custom_pipeline=DIR, trust_remote_code=True)
    fox = pipe("a red fox in the snow").images[0]
    winter = pipe("make it snow", task="ie", image=fox).images[0]
    wide = pipe("a fox", task="ip", image=fox, margins=(256, 0, 256, 0), height=512, width=1024)

It needs torch, diffusers and transformers alone. How the model was trained and is sampled stands in
the scheduler's configuration, as `_univg`; the export wrote it there.
"""

import copy
import functools
import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from diffusers import (
    AutoencoderKL,
    ConfigMixin,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
    ModelMixin,
    SD3Transformer2DModel,
)
from diffusers.configuration_utils import register_to_config
from diffusers.utils import load_image
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5EncoderModel,
    T5TokenizerFast,
)

# The pictures that each task takes.
INPUTS = {
    "t2i": (),
    "ie": ("image",),
    "ip": ("image", "mask"),
    "lg": ("image",),
    "depth": ("image",),
    "pose": ("image",),
    "seg": ("image",),
    "id": ("face",),
}
PERSON, STAND_IN = "<p>", "person"  # the person's place in a prompt, and what encoders read there
GRAY = 128  # of the source in the hole of an inpainting
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Picture = str | Image.Image | np.ndarray  # a path or an address, or uint8 RGB


class IdentityProjector(ModelMixin, ConfigMixin):
    """Embeddings of faces -> embeddings of text: two linear maps with a GELU between."""

    @register_to_config
    def __init__(self, face_dim: int, text_dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(face_dim, text_dim)
        self.linear_2 = nn.Linear(text_dim, text_dim)

    def forward(self, face: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(face), approximate="tanh"))


class UniVGPipeline(DiffusionPipeline):
    """Text-to-image, editing, inpainting, layout, depth, pose, segmentation and identity."""

    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->transformer->vae"

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer_2: CLIPTokenizer,
        text_encoder_3: T5EncoderModel | None,
        tokenizer_3: T5TokenizerFast | None,
    ):
        super().__init__()
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
        )

    @property
    def settings(self) -> dict:
        """How the model was trained and is sampled."""
        return self.scheduler.config["_univg"]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        *,
        task: str = "t2i",
        image: Picture | Sequence[Picture] | None = None,
        mask: Picture | Sequence[Picture] | None = None,
        face: Picture | Sequence[Picture] | None = None,
        margins: tuple[int, int, int, int] | None = None,
        negative_prompt: str | Sequence[str] = "",
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        solver: str | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable | None = None,
    ) -> ImagePipelineOutput:
        """Images of one task, one for each entry of a list of prompts or pictures.

        Pictures are cropped at the center to `height` x `width` pixels, by default the square of
        the training. `mask` is white where the image is made anew; what is black keeps its pixels.
        `margins` instead of a mask (left, top, right, bottom) are pixels to paint around the image.
        What `negative_prompt` says is avoided. `latents` is the noise to start from, of a standard
        normal, [b c h w]. What is not given is as the run had it. `output_type` is "pil", or "np"
        for floats in [0, 1].
        """
        settings = self.settings
        if task not in settings["tasks"]:
            raise ValueError(f"unknown task {task!r}; the model has {', '.join(settings['tasks'])}")
        if margins is not None:
            if task != "ip" or image is None or mask is not None:
                raise ValueError("margins go with task 'ip' and an image, instead of a mask")
            extended = [_extend(one, margins) for one in _each(image, 1)]
            is_list = isinstance(image, list | tuple)
            image, mask = zip(*extended, strict=True) if is_list else extended[0]
        given = {"image": image, "mask": mask, "face": face}
        for name, value in given.items():
            if (value is not None) != (name in INPUTS[task]):
                raise ValueError(f"task {task!r} takes {', '.join(INPUTS[task]) or 'no picture'}")
        lists = [v for v in (prompt, *given.values()) if isinstance(v, list | tuple)]
        count = len(lists[0]) if lists else 1
        if any(len(v) != count for v in lists):
            raise ValueError(f"lists of different lengths: {', '.join(str(len(v)) for v in lists)}")
        prompts = _each(prompt, count)
        if task == "id" and any(PERSON not in text for text in prompts):
            raise ValueError(f"a prompt of task 'id' has {PERSON} where the person stands")

        size = height or settings["resolution"], width or settings["resolution"]
        cell = 2 ** (len(self.vae.config.block_out_channels) - 1)
        unit = cell * self.transformer.config.patch_size
        if size[0] % unit or size[1] % unit:
            raise ValueError(f"height and width must be multiples of {unit}, got {size}")
        grid = size[0] // cell, size[1] // cell
        device = self._execution_device
        pixels = {
            name: torch.stack([_fit(v, size, is_mask=name == "mask") for v in _each(value, count)])
            for name, value in given.items()
            if name in ("image", "mask") and value is not None
        }

        source, hole = pixels.get("image"), pixels.get("mask")
        known = torch.zeros(count, self.vae.config.latent_channels, *grid, device=device)
        cells = torch.ones(count, 1, *grid, device=device)
        if hole is not None:
            source = torch.where(hole > 0, torch.tensor(float(GRAY)), source)
            cells = F.max_pool2d(hole, cell).to(device)  # one pixel to generate makes it whole
        if source is not None:
            known = self._encode(source.to(device) / 127.5 - 1)

        scales = self._guidance(task, guidance_scale, image_guidance_scale)
        if any(_each(negative_prompt, 1)) and not any(scales[1:]):
            raise ValueError("without guidance, or with 1, a negative_prompt changes nothing")
        faces = None if face is None else self._identify(_each(face, count))
        text = self._embed(prompts, task, faces)
        null = text if len(scales) == 1 else self._embed(_each(negative_prompt, count), task, None)
        passes = [(known, cells, text), (known, cells, null)]
        passes += [(torch.zeros_like(known), torch.ones_like(cells), null)]
        conditions = _stack(passes[: len(scales)])

        if latents is None:
            latents = randn_tensor(known.shape, generator=generator, device=torch.device(device))
        x = latents.to(device=device, dtype=torch.float32)
        steps = num_inference_steps or settings["steps"]
        times = _times(steps, self.scheduler.config.shift)
        velocity = functools.partial(self._velocity, conditions=conditions, weights=scales)
        with self.progress_bar(total=steps) as progress:
            for i in range(steps):
                t, dt = times[i], times[i + 1] - times[i]
                slope = velocity(x, t)
                if (solver or settings["solver"]) == "heun":
                    slope = (slope + velocity(x + dt * slope, times[i + 1])) / 2
                x = x + dt * slope
                progress.update()
                if callback_on_step_end is not None:
                    x = callback_on_step_end(self, i, t, {"latents": x}).get("latents", x)

        images = self._decode(x).cpu()
        if hole is not None:  # what is kept is the picture's own pixels
            images = torch.where(hole > 0, images, pixels["image"] / 255)
        images = images.permute(0, 2, 3, 1).numpy()
        self.maybe_free_model_hooks()
        if output_type == "pil":
            images = [Image.fromarray(np.rint(255 * one).astype(np.uint8)) for one in images]
        return ImagePipelineOutput(images=images)

    def _guidance(self, task: str, text: float | None, image: float | None) -> list[float]:
        """The weights of the velocities under (image, text), (image, null) and (null, null)."""
        own = self.settings["guidance"].get(task) or {}
        text = own.get("text") if text is None else text
        image = own.get("image") if image is None else image
        if text is None:
            return [1.0]
        if image is None:
            return [text, 1 - text]
        return [text, image - text, 1 - image]

    def _velocity(
        self, x: Tensor, t: float, *, conditions: tuple[Tensor, ...], weights: list[float]
    ) -> Tensor:
        """The guided velocity at latents `x` and time `t`, 1 at noise and 0 at data."""
        known, cells, text, pooled = conditions
        dtype, passes, settings = self.transformer.dtype, len(weights), self.settings
        inputs = torch.cat([torch.cat([x] * passes), cells, known], dim=1)
        each = self.transformer(
            hidden_states=inputs.to(dtype),
            timestep=torch.full((len(inputs),), 1000 * t, device=x.device),
            encoder_hidden_states=text.to(dtype),
            pooled_projections=pooled.to(dtype),
            return_dict=False,
        )[0]
        each = each.float().unflatten(0, (passes, len(x)))
        low, high = settings["interval"]
        if not low <= t <= high:
            return each[0]
        guided = sum(w * one for w, one in zip(weights, each, strict=True))
        if rescale := settings["rescale"]:
            deviation, own = (
                v.std(dim=(1, 2, 3), keepdim=True, correction=0) for v in (guided, each[0])
            )
            guided = guided * (rescale * own / deviation.clamp(min=1e-6) + 1 - rescale)
        return guided

    def _embed(
        self, texts: Sequence[str], task: str, faces: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings of prompts' tokens and of the whole; a face stands in the person's place."""
        tags = (
            rf"<\s*({'|'.join(INPUTS)})\s*>"  # a text must not look as if it were of another task
        )
        texts = [re.sub(tags, r"(\1)", text.strip(), flags=re.IGNORECASE) for text in texts]
        texts = [f"<{task}> {text}" if text else f"<{task}>" for text in texts]
        ids, real, slot = self._tokenize(self.tokenizer, texts, 77, task)
        # Rows are padded as the first encoder wants it; the second was trained with id 0.
        states = [
            encoder(tokens.to(encoder.device), output_hidden_states=True)
            for encoder, tokens in (
                (self.text_encoder, ids),
                (self.text_encoder_2, torch.where(real, ids, 0)),
            )
        ]
        text = torch.cat([state.hidden_states[-2] for state in states], dim=-1)
        pooled = torch.cat([state.text_embeds for state in states], dim=-1)
        text = F.pad(text, (0, self.transformer.config.joint_attention_dim - text.shape[-1]))
        if more := self.settings["num_tokens"] - 77:
            ids, _, more_slot = self._tokenize(self.tokenizer_3, texts, more, task)
            text = torch.cat([text, self.text_encoder_3(ids.to(text.device))[0]], dim=1)
            slot = torch.cat([slot, more_slot], dim=1)
        if faces is not None:
            text = torch.where(slot.to(text.device)[..., None], faces[:, None].to(text), text)
        return text, pooled

    def _tokenize(
        self, tokenizer: object, texts: list[str], length: int, task: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Ids of prompts, which of them are no padding, and where the person stands."""
        place = None
        if "face" in INPUTS[task]:
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.add_tokens([AddedToken(PERSON, normalized=False)])
            place = tokenizer.convert_tokens_to_ids(PERSON)
        rows = tokenizer(
            texts,
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
            return_attention_mask=True,
        )
        ids = rows.input_ids
        slot = ids == place if place is not None else torch.zeros_like(ids, dtype=torch.bool)
        for text, found in zip(texts, slot.sum(dim=1).tolist(), strict=True):
            if place is not None and found < text.count(PERSON):
                raise ValueError(f"{PERSON} would be cut off, of the prompt {text!r}")
        stand_in = tokenizer(STAND_IN, add_special_tokens=False).input_ids[0]
        return torch.where(slot, stand_in, ids), rows.attention_mask.bool(), slot

    def _identify(self, faces: Sequence[Picture]) -> Tensor:
        """What stands for the persons with these faces in a text's embedding."""
        encoder, projector = self._identity
        side, size = self.settings["face_resolution"], encoder.config.image_size
        rows = []
        for face in faces:
            pixels = _fit(face, (side, side)).permute(1, 2, 0).numpy().astype(np.uint8)
            resized = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
            rows.append((np.asarray(resized) / 255 - CLIP_MEAN) / CLIP_STD)
        pixels = torch.tensor(np.stack(rows), device=encoder.device, dtype=encoder.dtype)
        out = encoder(pixels.permute(0, 3, 1, 2))
        embedding = out.get("image_embeds", out.get("pooler_output")).float()
        return projector(F.normalize(embedding, dim=-1, eps=1e-9).to(projector.dtype))

    @functools.cached_property
    def _identity(self) -> tuple[nn.Module, IdentityProjector]:
        """The encoder of faces and the projector, which the pipelines of diffusers do not know."""
        where = self.config["_name_or_path"]
        kind = getattr(transformers, self.settings["face_encoder"])
        encoder = kind.from_pretrained(where, subfolder="image_encoder", dtype=self.vae.dtype)
        projector = IdentityProjector.from_pretrained(where, subfolder="identity_projector")
        device = self._execution_device
        return encoder.to(device), projector.to(device, self.transformer.dtype)

    def _encode(self, pixels: Tensor) -> Tensor:
        """Pictures in [-1, 1] -> latents of about unit variance."""
        config = self.vae.config
        raw = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.mode().float()
        return (raw - (config.shift_factor or 0)) * config.scaling_factor

    def _decode(self, latents: Tensor) -> Tensor:
        """Latents -> pictures in [0, 1]."""
        config = self.vae.config
        raw = latents / config.scaling_factor + (config.shift_factor or 0)
        pixels = self.vae.decode(raw.to(self.vae.dtype), return_dict=False)[0].float()
        return (pixels.clamp(-1, 1) + 1) / 2


def _each(value: object, count: int) -> list:
    return list(value) if isinstance(value, list | tuple) else [value] * count


def _extend(picture: Picture, margins: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The picture on a larger canvas, and the mask that is white where the canvas is new."""
    left, top, right, bottom = margins
    if min(margins) < 0 or not any(margins):
        raise ValueError(f"margins are pixels to add on some side, got {margins}")
    pixels, around = _pixels(picture, "RGB"), ((top, bottom), (left, right))
    mask = np.pad(np.zeros(pixels.shape[:2], np.uint8), around, constant_values=255)
    return np.pad(pixels, (*around, (0, 0)), mode="edge"), mask


def _stack(passes: Sequence[tuple]) -> tuple[Tensor, ...]:
    """(source latents, mask, (text, pooled)) of each pass -> all passes in one batch."""
    known, cells, texts = zip(*passes, strict=True)
    return tuple(torch.cat(parts) for parts in (known, cells, *zip(*texts, strict=True)))


def _times(steps: int, shift: float) -> list[float]:
    """The times between the solver's steps, from 1 down to 0."""
    t = np.linspace(1, 0, steps + 1)
    return (shift * t / (1 + (shift - 1) * t)).tolist()


def _pixels(picture: Picture, mode: str) -> np.ndarray:
    """The picture's pixels."""
    picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else load_image(picture)
    return np.array(picture.convert(mode))


def _fit(picture: Picture, size: tuple[int, int], *, is_mask: bool = False) -> Tensor:
    """The picture's central window of the aspect ratio of `size`, resized to it.

    Float [c h w] with the values of uint8 RGB; of a mask 1 where it is white, else 0.
    """
    pixels = _pixels(picture, "L" if is_mask else "RGB").astype(np.float32)
    pixels = torch.from_numpy((pixels[..., None] > 127) * 1.0 if is_mask else pixels).float()
    (height, width), (h, w) = pixels.shape[:2], size
    if width * h >= height * w:
        window = height, min(width, max(1, round(height * w / h)))
    else:
        window = min(height, max(1, round(width * h / w))), width
    top, left = (height - window[0]) // 2, (width - window[1]) // 2
    pixels = pixels[top : top + window[0], left : left + window[1]].permute(2, 0, 1)
    if window == size:
        return pixels
    if size[0] <= window[0] and size[1] <= window[1]:  # means over areas
        rows, columns = (_area_weights(old, new) for old, new in zip(window, size, strict=True))
        pixels = torch.einsum("hi,wj,cij->chw", rows, columns, pixels)
    else:
        mode = "bilinear" if is_mask else "bicubic"
        pixels = F.interpolate(pixels[None], size=size, mode=mode, align_corners=False)[0]
    return (pixels >= 0.5).float() if is_mask else pixels.round().clamp(0, 255)


def _area_weights(old: int, new: int) -> Tensor:
    """How much each of `old` pixels counts in each of `new` ones, [new old]."""
    edges = torch.linspace(0, old, new + 1, dtype=torch.float64)[:, None]
    pixel = torch.arange(old)
    overlap = torch.minimum(edges[1:], pixel + 1) - torch.maximum(edges[:-1], pixel)
    return (overlap.clamp(min=0) * new / old).float()
