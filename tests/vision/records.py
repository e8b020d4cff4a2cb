"""Records with pictures, in the forms that `image_chat` reads."""

import json

import numpy as np


def write_records(folder, count=12, seed=0):
    """Records with none, one and two pictures of different sizes, in both forms of contents."""
    from PIL import Image

    random = np.random.default_rng(seed)
    records = []
    for number in range(count):
        files = []
        for place in range(number % 3):
            height, width = random.integers(56, 120, 2)
            file = f"{number}_{place}.png"
            Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)).save(folder / file)
            files.append(file)
        if number % 2:
            content = [*({"type": "image"} for _ in files), {"type": "text", "text": f"Number {number}?"}]
        else:
            content = "<image>" * len(files) + f"Number {number}?"
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": f"It is {number}."}]
        records.append({"messages": turns, "images": files})
    (folder / "records.jsonl").write_text("\n".join(map(json.dumps, records)))
    return f"image_chat(path='{folder}/records.jsonl', held_out=0.3, max_pixels=6272)"
