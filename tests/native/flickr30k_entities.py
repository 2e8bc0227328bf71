"""Flickr30k Entities in miniature: chains, scenes, things of two chains, unrelated captions."""

import pathlib

from tests.native.drawing import SIZES, picture, write_file, write_zip

RECORDS = {"train": 4, "validation": 1, "test": 1}
# Of each picture: its objects (chains, box from 1 and inclusive or what stands in its place).
OBJECTS = {
    "1001": [  # 96 x 64
        (("11",), (11, 5, 50, 40)),
        (("12",), (51, 9, 97, 64)),  # one pixel outside
        (("12", "15"), (61, 20, 80, 30)),
        (("13",), "scene"),
        (("14",), "nobndbox"),
        (("0",), (1, 1, 9, 9)),
    ],
    "1002": [(("21",), (1, 1, 64, 96)), (("22",), (30, 40, 20, 60)), (("23",), (5, 5, 400, 9))],
    "1003": [(("31",), (1, 1, 1, 1))],
    "1004": [(("41",), (2, 3, 20, 30))],
    "1005": [(("51",), "scene")],  # nothing has a box
    "1006": [(("61",), (10, 10, 90, 90))],
    "1007": [(("71",), (3, 3, 40, 40))],
}
SENTENCES = {
    "1001": [
        "[/EN#11/people A man 's arm] holds [/EN#12/animals/other two dogs] in [/EN#13/scene mud].",
        "[/EN#0/notvisual It] shows [/EN#15/animals a dog] in [/EN#99/other rain] .",
        "This sentence is about [/EN#11/people nobody] here .",
        "[/EN#11/bodyparts/people Texas A&M fan # 8] runs with [/EN#14/other a ball] .",
        "Nothing is marked in this sentence .",
    ],
    "1002": ["[/EN#21/people A girl] near [/EN#22/other a wall] and [/EN#23/other a pole] ."] * 5,
    "1003": [
        "a cat sees [/EN#31/animals a cat] .",  # the phrase would be found at the first cat
        "[/EN#31/animals A small cat] sits .",
    ]
    + ["[/EN#31/animals The cat] looks up ."] * 3,
    "1004": ["[/EN#41/people A boy] jumps ."] * 5,
    "1005": ["[/EN#51/scene A street] at night ."] * 5,
    "1006": ["[/EN#61/people A woman] reads ."] * 5,
    "1007": ["[/EN#71/people A child] sleeps ."] * 5,
}
LISTS = {"train": "1001 1002 1003 1004 1005", "val": "1006", "test": "1007"}


def write(root: pathlib.Path) -> dict:
    """Annotations in a zip, pictures in a folder."""
    write_zip(root / "annotations.zip", annotations())
    for name, ids in LISTS.items():
        write_file(root / f"{name}.txt", "\n".join(ids.split()))
    write_file(root / "UNRELATED_CAPTIONS", "1001 3\n7 1\n")
    for k, name in enumerate(OBJECTS):
        write_file(root / "flickr30k-images" / f"{name}.jpg", picture(k))
    return {"source": str(root)}


def annotations() -> dict[str, str]:
    """The files of annotations by name."""
    files = {f"Sentences/{k}.txt": "\n".join(lines) + "\n" for k, lines in SENTENCES.items()}
    for k, (name, things) in enumerate(OBJECTS.items()):
        files[f"Annotations/{name}.xml"] = xml(name, SIZES[k % len(SIZES)], things)
    return files


def xml(name: str, size: tuple[int, int], things) -> str:
    """The boxes of a picture of this width and height."""
    text = "".join(_thing(chains, box) for chains, box in things)
    return (
        f"<annotation>\n<filename>{name}.jpg</filename>\n<size><width>{size[0]}</width>"
        f"<height>{size[1]}</height><depth>3</depth></size>\n{text}</annotation>\n"
    )


def _thing(chains, box) -> str:
    names = "".join(f"<name>{chain}</name>" for chain in chains)
    if isinstance(box, str):
        flags = f"<scene>{int(box == 'scene')}</scene><nobndbox>1</nobndbox>"
        return f"<object>{names}{flags}</object>\n"
    sides = "".join(
        f"<{side}>{value}</{side}>"
        for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return f"<object>{names}<bndbox>{sides}</bndbox></object>\n"
