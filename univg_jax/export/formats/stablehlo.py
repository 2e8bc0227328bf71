"""Programs in StableHLO with their weights beside them, and a loader that needs none of our code.

    load.py                      `univg_jax/export/load.py`, copied
    manifest.json                what each program takes and gives, in order, and what tasks ask for
    programs/NAME.PLATFORM       what `jax.export` wrote; `univg_jax.export.programs` has the names
    model.safetensors            the weights of all programs, each once; or several and an index
    tokenizer.json               of the package tokenizers: makes rows of token ids, cut and padded
    tokenizer_face.json          the same for prompts with `<p>`; where the model takes faces

Every program is written for each platform by itself, with the attention that is best there.
"""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import tokenizers
from jax import export
from jaxtyping import UInt8

from data_pipelines import tasks, transforms
from data_pipelines.tasks import TASKS
from data_pipelines.tokenizer import EncoderTokenizer, SD3Tokenizer, load_tokenizer
from univg_jax import assembly, encoders
from univg_jax.batch import BatchShape
from univg_jax.errors import needs_extra
from univg_jax.export import load
from univg_jax.export.compare import Case, Image
from univg_jax.export.format import Answer, Format
from univg_jax.export.job import Job
from univg_jax.export.programs import MODEL, SAMPLERS, Placeholders, Program, make_programs
from univg_jax.files import write_whole
from univg_jax.inputs import Request, make_request
from univg_jax.interop.tensors import TensorFolder
from univg_jax.interop.writing import write_sharded
from univg_jax.pipeline import trained_tasks
from univg_jax.sampling import guidance_weights, solver_times
from univg_jax.streaming import Tensor
from univg_jax.trained import WEIGHTS
from univg_jax.trees import Json

PLATFORMS = ("cpu", "tpu", "cuda")
SAMPLER_INPUTS = {"image": "source", "mask": "mask", "face": "face"}  # what a sampler calls INPUTS
LOADER, MANIFEST = "load.py", "manifest.json"
VERSION = 1  # of the manifest


def check(job: Job) -> None:
    """Raises NotFoundError without the package that `jax.export` writes with."""
    with needs_extra("stablehlo", "--format=stablehlo"):
        import flatbuffers  # noqa: F401


def write(job: Job, out: Path) -> None:
    """Writes weights tensor by tensor, then the programs, and the manifest last."""
    tensors = all_tensors(job)
    write_sharded(out, WEIGHTS, tensors, max_file_bytes=job.max_file_bytes)
    written = TensorFolder(out, WEIGHTS)
    for name, text in tokenizer_files(job).items():
        write_whole(out / name, text)
    write_whole(out / LOADER, Path(load.__file__).read_bytes())
    manifest = describe(job) | {
        "programs": write_programs(job, tensors, out),
        "weights": {name: written.file_of[name].name for name in tensors},
    }
    write_whole(out / MANIFEST, json.dumps(manifest, indent=1))


def all_tensors(job: Job) -> dict[str, Tensor]:
    """The weights of all programs, the model's in the dtype of the export."""
    of_model = {f"{MODEL}/{name}": tensor for name, tensor in job.tensors.items()}
    of_encoders = encoders.tensors(job.trained.folder, folder=job.config.conditioning.folder)
    return of_model | of_encoders


def write_programs(job: Job, tensors: dict[str, Tensor], out: Path) -> dict[str, Json]:
    """Writes every program for every platform; returns what the manifest says of them."""
    found = encoders.abstract(job.config.conditioning)
    model = assembly.make_model(job.config, found.conditioner)
    programs = make_programs(
        assembly.make_generator(job.config, model, found.conditioner),
        {name: jax.ShapeDtypeStruct(t.shape, t.dtype) for name, t in tensors.items()},
        shapes=BatchShape.buckets(job.config.data),
        placeholders=placeholders(job),
    )
    return {
        name: _write_program(program, out / "programs" / name) for name, program in programs.items()
    }


def _write_program(program: Program, path: Path) -> Json:
    """Writes a program for every platform; returns what the manifest says of it."""
    weights, inputs = program.abstract()
    names: list[str] = []

    def flat(weight_values: Sequence[Any], input_values: Sequence[Any]) -> list[Any]:
        given = dict(zip(inputs, input_values, strict=True))
        made = program.function(dict(zip(weights, weight_values, strict=True)), given)
        names[:] = made
        return list(made.values())

    # Unused arguments stay, so that the module's own are those that the manifest lists.
    function = jax.jit(flat, keep_unused=True)
    arguments = (list(weights.values()), list(inputs.values()))
    with _without_source_paths():
        for platform in PLATFORMS:
            made = export.export(function, platforms=[platform])(*arguments)
            write_whole(path.with_name(f"{path.name}.{platform}"), bytes(made.serialize()))
    return {
        "calling_convention": made.calling_convention_version,
        "weights": list(weights),
        "inputs": {
            name: {"dtype": given.dtype.name, "shape": list(given.shape), "about": given.about}
            | ({} if given.default is None else {"default": given.default})
            for name, given in program.inputs.items()
        },
        "outputs": {
            name: {
                "dtype": x.dtype.name,
                "shape": [d if isinstance(d, int) else str(d) for d in x.shape],
            }
            for name, x in zip(names, made.out_avals, strict=True)
        },
    }


@contextlib.contextmanager
def _without_source_paths() -> Iterator[None]:
    """JAX notes for each operation which lines of which files made it: not in what others get."""
    option = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, option)
    jax.config.update(option, 0)
    try:
        yield
    finally:
        jax.config.update(option, before)


def describe(job: Job) -> Json:
    """The manifest but for the programs and weights."""
    return {
        "version": VERSION,
        "jax": jax.__version__,
        "platforms": list(PLATFORMS),
        "size": _size(BatchShape.of(job.config.data)),
        "sizes": [_size(shape) for shape in BatchShape.buckets(job.config.data)],
        "tasks": {name: describe_task(job, name) for name in trained_tasks(job.config)},
    }


def describe_task(job: Job, name: str) -> Json:
    """Which sampler makes a task's pictures, and the inputs that are the same in each call."""
    sampling, task = job.config.sampling, TASKS[name]
    weights = guidance_weights(sampling.guidance.get(name))
    inputs: Json = {
        "times": np.asarray(solver_times(sampling.sampler)).tolist(),
        "guidance_weights": list(weights),
        "has_source": "image" in task.inputs,
        "has_mask": "mask" in task.inputs,
    }
    if takes_faces(job):
        inputs["has_face"] = "face" in task.inputs
    if len(weights) > 1:
        null = _tokenizer(job)(tasks.prompt(name, ""), job.config.data.num_tokens)
        inputs["null_tokens"] = null.tokens.tolist()
        inputs["null_text_mask"] = null.text_mask.tolist()
    suffix = "_face" if "face" in task.inputs else ""
    files = [f"{part}{suffix}.json" for part in _tokenizer(job).parts(job.config.data.num_tokens)]
    return {
        "tag": tasks.prompt(name, ""),
        "tokenizers": files,
        "program": SAMPLERS[len(weights)],
        "inputs": inputs,
    }


def _size(shape: BatchShape) -> str:
    return f"{shape.height}x{shape.width}"


def takes_faces(job: Job) -> bool:
    """Whether the model has an identity encoder."""
    return job.config.conditioning.identity is not None


def tokenizer_files(job: Job) -> dict[str, str]:
    """The tokenizers that make a row of token ids, by the names of their files."""
    files = {}
    for name, (part, count) in _tokenizer(job).parts(job.config.data.num_tokens).items():
        files[f"{name}.json"] = part.to_json(count, with_placeholder=False)
        if takes_faces(job):
            files[f"{name}_face.json"] = part.to_json(count, with_placeholder=True)
    return files


def placeholders(job: Job) -> Placeholders:
    """What the programs read for `<p>`."""
    parts = _tokenizer(job).parts(job.config.data.num_tokens).values()
    placeholder = [
        part.placeholder if takes_faces(job) else -1 for part, n in parts for _ in range(n)
    ]
    return Placeholders(
        placeholder=np.array(placeholder, np.int32),
        stand_in=np.array([part.stand_in for part, n in parts for _ in range(n)], np.int32),
    )


def _tokenizer(job: Job) -> EncoderTokenizer | SD3Tokenizer:
    return load_tokenizer(encoders.tokenizer_folder(job.config.conditioning))


def reload(job: Job, folder: Path) -> Answer:
    """The pictures that the copied loader makes.

    On a CPU in another process, which imports nothing of ours; an accelerator belongs to one
    process, so there the loader is imported here.
    """

    def answer(cases: Sequence[Case]) -> list[Image]:
        requests = [make_request(c.task, data=job.config.data, **c.inputs) for c in cases]
        inputs = [
            inputs_of(job, folder, request) | {"seeds": np.array([case.seed])}
            for request, case in zip(requests, cases, strict=True)
        ]
        tasks_ = [case.task for case in cases]
        if jax.default_backend() == "cpu":
            made = run_loader(folder, tasks_, inputs)
        else:
            model = import_loader(folder).Model(folder)
            made = [model.sample(t, **given) for t, given in zip(tasks_, inputs, strict=True)]
        finished = (r.finish(images[0])[0] for r, images in zip(requests, made, strict=True))
        return [np.asarray(image) for image in finished]

    return answer


def inputs_of(job: Job, folder: Path, request: Request) -> dict[str, np.ndarray]:
    """The inputs of a sampler for a request, one row, by the tokenizers in a folder."""
    task, example = TASKS[request.task], request.example
    named = json.loads((folder / MANIFEST).read_text())["tasks"][request.task]["tokenizers"]
    text = tasks.prompt(request.task, example.text)
    rows = [tokenizers.Tokenizer.from_file(str(folder / name)).encode(text) for name in named]
    given = {
        "tokens": np.array([[i for row in rows for i in row.ids]]),
        "text_mask": np.array([[i for row in rows for i in row.attention_mask]], bool),
    }
    pictures = {SAMPLER_INPUTS[kind] for kind in task.inputs}
    given |= {name: getattr(example, name)[None] for name in pictures - {"face"}}
    if "face" in pictures:
        side = job.config.data.face_resolution
        given["face"] = transforms.resize_image(example.face, height=side, width=side)[None]
    return given


def run_loader(
    folder: Path, names: Sequence[str], inputs: Sequence[Mapping[str, np.ndarray]]
) -> list[UInt8[np.ndarray, "b h w 3"]]:
    """The pictures of tasks and their inputs, by the loader in a folder, in a process of its own.

    Raises RuntimeError with what it says if it fails.
    """
    with tempfile.TemporaryDirectory() as temporary:
        arguments = []
        for i, (name, given) in enumerate(zip(names, inputs, strict=True)):
            files = os.path.join(temporary, f"{i}.npz"), os.path.join(temporary, f"{i}.npy")
            np.savez(files[0], **given)
            arguments += [name, *files]
        done = subprocess.run(
            [sys.executable, "-I", str(folder / LOADER), *arguments],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{LOADER} failed:\n{done.stderr}")
        return [np.load(file) for file in arguments[2::3]]


def import_loader(folder: Path) -> ModuleType:
    """The loader in a folder, as a module."""
    spec = importlib.util.spec_from_file_location("univg_loader", folder / LOADER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def usage(job: Job) -> str:
    """Code that makes a picture."""
    name = trained_tasks(job.config)[0]
    task, weights = TASKS[name], guidance_weights(job.config.sampling.guidance.get(name))
    text = task.prompt_example if task.prompt != "none" else ""
    given = [SAMPLER_INPUTS[kind] for kind in task.inputs]
    pictures = "".join(f", {kind}=[{kind}]" for kind in given)
    shift = job.config.sampling.shift
    shifted = f"\ntimes = {shift} * times / (1 + {shift - 1} * times)  # shifted, as the run's are"
    negative = f"""
negative = read({name!r}, "blurry")  # what guidance leads away from
null = dict(null_tokens=negative["tokens"], null_text_mask=negative["text_mask"])
images = model.sample({name!r}, **prompt, **null{pictures}, seeds=[7])"""
    return f"""# pip install jax flatbuffers numpy safetensors tokenizers
import numpy as np
from tokenizers import Tokenizer

from load import Model

model = Model(".")


def read(task, text):
    files = model.manifest["tasks"][task]["tokenizers"]
    parts = [Tokenizer.from_file(file).encode(f"<{{task}}> {{text}}".strip()) for file in files]
    ids, mask = (sum((getattr(p, x) for p in parts), []) for x in ("ids", "attention_mask"))
    return dict(tokens=[ids], text_mask=[mask])


prompt = read({name!r}, {text!r})
images = model.sample({name!r}, **prompt{pictures}, seeds=[7])  # uint8 [1 h w 3]
times = np.linspace(1, 0, 9)  # 8 steps instead of those of the run{shifted if shift != 1 else ""}
images = model.sample({name!r}, **prompt{pictures}, seeds=[7], times=times)
{negative if len(weights) > 1 else ""}
# Other tasks take source=, mask= (1 = generate) and face=, RGB bytes: see manifest.json."""


def limits(job: Job) -> list[str]:
    """What the programs do not do."""
    data = job.config.data
    sizes = ", ".join(f"{s.width}x{s.height}" for s in BatchShape.buckets(data))
    faces = (
        f", portraits of {data.face_resolution}x{data.face_resolution}" if takes_faces(job) else ""
    )
    return [
        "A program runs on one device: the weights are not split over several.",
        f"Sizes are fixed: pictures of {sizes} pixels (height x width){faces}, prompts of "
        f"{data.num_tokens} tokens. The number of rows is not, nor are steps, seeds and guidance.",
        f"The solver is {job.config.sampling.solver}. Attention is a Pallas kernel on TPUs; on "
        "CUDA it keeps all scores in memory.",
        f"jax {jax.__version__} wrote it. JAX promises that its releases of the 6 months after "
        "that one and of the 3 weeks before it run the programs; export again after that.",
        "Weights of pretrained encoders are in this folder: read their licenses before you pass "
        "it on.",
        "univg_jax does not read it back: to train on, export as safetensors or orbax.",
    ]


def num_bytes(job: Job) -> int:
    """About what is written."""
    return sum(tensor.num_bytes for tensor in all_tensors(job).values()) + 2**26


FORMAT = Format(
    title="StableHLO programs with their weights, for CPUs, TPUs and CUDA GPUs",
    opened_by="`load.py` in this folder runs them, with jax, flatbuffers, numpy and safetensors",
    holds_encoders=True,
    write=write,
    reload=reload,
    usage=usage,
    num_bytes=num_bytes,
    check=check,
    limits=limits,
)
