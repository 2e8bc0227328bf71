"""An evaluation job against the bare sampler: images a second, of one checkpoint.

The job tokenizes and encodes prompts, samples, and writes PNG files; the bare sampler samples one
batch, tokenized before, again and again. Both alternate in one process, and the fastest round of
each counts. Prints images a second and their ratio.

    python benchmarks/evaluation.py --checkpoint=runs/quickstart/stage3
"""

import argparse
import dataclasses
import tempfile

from timing import best_seconds

from data_pipelines.tasks import TASKS
from univg_jax.evaluation import job
from univg_jax.evaluation.official import Request
from univg_jax.evaluation.prompts import EncodedPrompts
from univg_jax.pipeline import Pipeline


def main() -> None:
    """Measures, and prints images a second."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default="runs/quickstart/stage3")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--batches", type=int, default=8, help="in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=4, help="of each prompt")
    args = parser.parse_args()
    pipeline = Pipeline.load(args.checkpoint)
    prompts = EncodedPrompts(pipeline.tokenizer, pipeline.embed_prompts)
    collator = dataclasses.replace(pipeline.collator, tokenizer=prompts)
    encoded = dataclasses.replace(pipeline, collator=collator)
    count = args.batch_size * args.batches
    requests = [
        Request(
            index=index,
            task="t2i",
            inputs={"prompt": f"a fox and {index} pigs on grass"},
            files=tuple(f"{index:05}/{k:04}.png" for k in range(args.images)),
        )
        for index in range(count // args.images)
    ]
    task, side = TASKS["t2i"], pipeline.config.data.resolution
    examples = [task.from_inputs(**r.inputs, resolution=side) for r in requests] * args.images
    batch = pipeline.collator(
        [
            pipeline.collator.row(example, task="t2i", sample_id=k)
            for k, example in enumerate(examples[: args.batch_size])
        ]
    )

    def bare() -> None:
        for _ in range(args.batches):
            pipeline.generate_batch(batch, "t2i")

    def whole() -> None:
        with tempfile.TemporaryDirectory() as folder:
            job.generate(
                requests,
                folder,
                answer=lambda batch, task: encoded.generate_batch(batch, task),
                collator=collator,
                batch_size=args.batch_size,
                prompts=prompts,
            )

    seconds = best_seconds({"bare sampler": bare, "job": whole}, rounds=args.rounds)
    for name, time in seconds.items():
        print(f"{name:13} {count / time:8.2f} images/s")
    print(f"job / bare sampler: {seconds['bare sampler'] / seconds['job']:.3f}")


if __name__ == "__main__":
    main()
