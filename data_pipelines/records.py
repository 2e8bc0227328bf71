"""What a stored example is: a dict of named fields, each with one TFDS feature and one decoded form.

A dataset stores the fields that it has; a task names the fields that it needs
(`data_pipelines.tasks`), and any dataset that has them serves it. Images are stored as encoded
bytes (PNG or JPEG), and decoded by `decode` to numpy:

| field | stored as | decoded |
|---|---|---|
| image, source | RGB, 8 bit | uint8 [h w 3] |
| caption, instruction | text | str |
| edit_mask | PNG, 8 bit, 255 = changed by the edit | uint8 [h w], 0 or 1 |
| depth | PNG, 16 bit, millimetres | float32 [h w], metres |
| boxes | [k, 4] | float32 [k 4]: x0 y0 x1 y1 in [0, 1] of width and height |
| phrases | [k] text | list[str]: the noun phrase of each box, a substring of `caption` |
| masks | [k] PNG, 8 bit, 255 = object | uint8 [k h w], 0 or 1 |
| expressions | [k] text | list[str]: refers to mask k alone; empty if none is unambiguous |
| joints | [17, 3] | float32 [17 3]: COCO-17 x, y in [0, 1], visibility 0 or 1 |
| face | RGB, 8 bit | uint8 [f f 3]: another picture of the person in `image` |
| person | int64 | int |
"""
