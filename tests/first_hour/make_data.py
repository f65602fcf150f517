"""Write three data files of shapes that no recipe knows: conversations, a table of reviews, questions in parquet.

python tests/first_hour/make_data.py FOLDER
"""

import csv
import json
import random
import sys
from pathlib import Path

import pyarrow
from pyarrow import parquet

PLACES = ["harbour", "library", "market", "station", "museum", "garden"]
GOOD = ["friendly staff", "a quiet room", "fair prices", "good coffee", "short queues"]
BAD = ["rude staff", "a noisy room", "high prices", "cold coffee", "long queues"]


def make(folder: Path, count: int = 60) -> list[Path]:
    """Write `support.jsonl`, `reviews.csv` and `sums.parquet` of so many records; return the three files."""
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "support.jsonl", folder / "reviews.csv", folder / "sums.parquet"]
    with files[0].open("w", encoding="utf-8") as stream:
        for number in range(count):
            stream.write(json.dumps({"id": number, "conversations": _conversation(draw)}) + "\n")
    with files[1].open("w", encoding="utf-8", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["place", "review", "sentiment"])
        for _ in range(count):
            mood = draw.choice(["positive", "negative"])
            place = draw.choice(PLACES)
            words = draw.choice(GOOD if mood == "positive" else BAD)
            table.writerow([place, f"The {place}, on my visit: {words}.", mood])
    pairs = [(draw.randrange(50), draw.randrange(50)) for _ in range(count)]
    columns = {"question": [f"What is {a} + {b}?" for a, b in pairs], "answer": [str(a + b) for a, b in pairs]}
    parquet.write_table(pyarrow.table(columns), files[2])
    return files


def _conversation(draw: random.Random) -> list[dict[str, str]]:
    place, hour = draw.choice(PLACES), draw.randrange(7, 12)
    return [
        {"from": "human", "value": f"When does the {place} open?"},
        {"from": "gpt", "value": f"The {place} opens at {hour}."},
        {"from": "human", "value": "And on Sundays?"},
        {"from": "gpt", "value": f"An hour later, at {hour + 1}."},
    ]


if __name__ == "__main__":
    print("\n".join(map(str, make(Path(sys.argv[1])))))
