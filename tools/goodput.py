"""How often XL at 512 px should save on each recommended pod, and what failures cost it there.

    python tools/goodput.py

Writes a table of BUILD.md from the rooflines of the table before it, which are lower bounds of a
step. The rest is assumed, not measured: `ASSUMED`. Your own figures: `univg plan --goodput`.
"""

import math
import pathlib
import re

from experiments import pods
from univg_jax.planning.goodput import Times, best_every, expected
from univg_jax.planning.topology import num_chips

ROOT = pathlib.Path(__file__).parents[1]
STATE = 58e9  # bytes of XL's parameters, average and moments
CHIPS_PER_HOST = 4
ASSUMED = dict(
    to_storage=0.5e9,  # bytes a second of one host
    to_host=10e9,  # the same, from its chips' memory
    compile=180.0,
    restart=300.0,
    mtbf=50_000 * 3600.0,  # of one chip
)


def row(pod: str, step: float) -> str:
    """A line of the table."""
    chips = num_chips(pods.TOPOLOGIES[pod])
    hosts = math.ceil(chips / CHIPS_PER_HOST)
    blocked = STATE / hosts / ASSUMED["to_host"]
    written = STATE / hosts / ASSUMED["to_storage"]
    times = Times(
        step=step,
        blocked=blocked,
        save=blocked + written,
        restore=written,
        compile=ASSUMED["compile"],
        restart=ASSUMED["restart"],
    )
    of = dict(chips=chips, mtbf=ASSUMED["mtbf"])
    every = best_every(times, **of)
    shares = [expected(times, **of, every=n) for n in (every, 2000)]
    return (
        f"| {pod} | {chips} | {ASSUMED['mtbf'] / chips / 86400:.1f} days | {blocked:.2f} s, "
        f"{times.save:.0f} s | {every:,} | {shares[0]:.2%} | {shares[1]:.2%} |"
    )


def main() -> None:
    """Writes the table."""
    build = ROOT / "BUILD.md"
    text = build.read_text()
    found = re.findall(r"^\| (\S+) \| XL \| 512 \|.*\| (\d+) ms, \w+ \|", text, flags=re.MULTILINE)
    lines = [
        "| pod | chips | a failure every | a save blocks, is whole after | best `save_every` | "
        "goodput | of 2,000 |",
        "|---|---|---|---|---|---|---|",
        *(row(pod, int(milliseconds) / 1e3) for pod, milliseconds in found),
    ]
    begin, end = "<!-- goodput: made by tools/goodput.py -->\n", "<!-- end of goodput -->"
    before, _, rest = text.partition(begin)
    build.write_text(before + begin + "\n".join(lines) + "\n" + end + rest.partition(end)[2])


if __name__ == "__main__":
    main()
