"""Many threads ask while adapters are replaced, dropped, loaded and aliased: nobody is lost, nobody gets another's."""

from __future__ import annotations

import random
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from fleet import BASE, RANKED, TEXTS, alone, bare, save_fleet, tokenizer_of

from ia3.serving.engine import Engine
from ia3.serving.intake import Limits
from ia3.serving.registry import Registry
from ia3.serving.requests import Refused, Request, UnknownModel
from ia3.tasks.task import TaskKind

CONTENTS = {
    "one": RANKED,
    "two": RANKED,
    "three": RANKED | {"pattern": "the share {text}"},
    "four": {"kind": TaskKind.GENERATION, "max_length": 64, "max_new_tokens": 4},
}
NAMES = ("a", "b", "deep/c", "d")
THREADS, REQUESTS = 12, 40


class Weather:
    """What happens to a folder of adapters meanwhile, drawn from whole contents."""

    def __init__(self, registry: Registry, contents: Path, seed: int) -> None:
        self.registry, self.contents, self.chance = registry, contents, random.Random(seed)
        self.count = 0

    def __call__(self) -> None:
        self.count += 1
        self.chance.choice((self.replace, self.replace, self.half, self.drop, self.load, self.alias))()

    def replace(self) -> None:
        """A folder takes another's place."""
        place = self.registry.folder / self.chance.choice(NAMES)
        away = self.registry.folder.parent / f"away-{self.count}"
        new = shutil.copytree(self.contents / self.chance.choice([*CONTENTS]), f"{away}-new")
        if place.exists():
            place.rename(away)
        place.parent.mkdir(exist_ok=True)
        Path(new).rename(place)

    def half(self) -> None:
        """A file is written slowly."""
        path = self.registry.folder / self.chance.choice(NAMES) / "adapter_model.safetensors"
        if path.exists():
            whole = path.read_bytes()
            path.write_bytes(whole[: len(whole) // 2])
            self.registry.refresh()
            path.write_bytes(whole)

    def drop(self) -> None:
        with suppress(UnknownModel):
            self.registry.unload(self.chance.choice(NAMES))

    def load(self) -> None:
        with suppress(Refused):  # it was being replaced
            self.registry.load(self.chance.choice((*NAMES, "e")), self.chance.choice(NAMES))

    def alias(self) -> None:
        with suppress(UnknownModel):
            self.registry.alias("prod", self.chance.choice((*NAMES, "e")))


def until(done: threading.Event, do: Callable[[], None]) -> None:
    while not done.wait(2e-3):
        do()


@pytest.mark.parametrize("seed", range(2))
def test_none_is_lost_and_none_gets_anothers_answer(tmp_path: Path, seed: int) -> None:
    contents = save_fleet(tmp_path / "contents", CONTENTS)
    folder = tmp_path / "folder"
    for name, content in zip(NAMES, CONTENTS, strict=True):
        shutil.copytree(contents / content, folder / name)
    model = bare()
    registry = Registry(model, folder, base=BASE)
    engine = Engine(model, tokenizer_of(), registry, Limits(batch_size=6))
    digests = {served.name: served.digest for served in registry.models()}
    expected = {
        digests[name]: dict(zip(TEXTS, alone(contents / content, TEXTS), strict=True))
        for name, content in zip(NAMES, CONTENTS, strict=True)
    }
    assert len(expected) == len(CONTENTS)
    weather, done, seen = Weather(registry, contents, seed), threading.Event(), set[str | None]()

    def ask(thread: int) -> list[str]:
        chance, outcomes = random.Random(f"{seed} {thread}"), []
        while len(outcomes) < REQUESTS:
            name, text = chance.choice((*NAMES, "e", "prod", f"{BASE}:a")), chance.choice(TEXTS)
            try:
                future = engine.submit(Request(text, name))
            except UnknownModel:  # it was dropped, or is e, which may never have been loaded
                time.sleep(1e-3)
                continue
            if chance.random() < 0.1 and future.cancel():
                with pytest.raises(CancelledError):
                    future.result(60)
                outcomes.append("cancelled")
                continue
            answer = future.result(60)
            alone_ = expected[answer.digest][text]
            assert answer.text == alone_.label
            assert answer.probabilities == (alone_.probabilities and pytest.approx(alone_.probabilities, abs=1e-5))
            seen.add(answer.digest)
            outcomes.append("answered")
        return outcomes

    storms = [threading.Thread(target=until, args=(done, do)) for do in (weather, registry.refresh)]
    for storm in storms:
        storm.start()
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            outcomes = [each for some in pool.map(ask, range(THREADS)) for each in some]
    finally:
        done.set()
        for storm in storms:
            storm.join()
    assert engine.drain(60)  # a version is let go of after its answer
    stats = engine.stats()
    assert len(outcomes) == THREADS * REQUESTS
    assert (stats["requests_answered"], stats["requests_cancelled"]) == (
        outcomes.count("answered"),
        outcomes.count("cancelled"),
    )
    assert weather.count > 20
    assert len(seen) == len(CONTENTS)
    # What nobody holds left the table.
    served = {each.digest for each in registry.models()} - {None}
    assert served == {*registry._versions}
    assert len(registry.table) == len(served)
    engine.close()
    assert type(model) is type(bare())
