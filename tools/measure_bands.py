"""How far apart are two backends, or two compute dtypes of one, at the same weights?

    python tools/measure_bands.py [--steps 60]

Trains two small models in float32, and at the start, half way and the end measures what comes next
(`solollm.continuation`) in every dtype of every backend that runs here. Printed is the largest
relative deviation of each pair; the bands in `solollm/continuation.py` are some times these.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from solollm.architecture import ModelConfig
from solollm.backend import Backend, DictSource, Plan, TrainSession
from solollm.certificate import Continuation
from solollm.config import RunConfig
from solollm.continuation import compare, look_ahead
from solollm.data.stream import BatchStream, open_stream
from solollm.horizon import session_options, updated
from solollm.registry import find_backends
from solollm.resume_proof import tiny_training
from solollm.schedule import lr_at

ROWS, SEQ_LEN = 6, 64
SIZES = {"2 layers, width 64": (2, 64), "6 layers, width 192": (6, 192)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    backends = {c.name: c.factory() for c in find_backends() if c.probe.available and c.factory}
    with tempfile.TemporaryDirectory() as folder:
        config = tiny_training(Path(folder), steps=steps)
        stream = open_stream(
            Path(config.data.corpus), seq_len=SEQ_LEN, batch_size=ROWS, split="train"
        )
        for size, (layers, width) in SIZES.items():
            print(f"\n{size}, at steps 0, {steps // 2} and {steps}")
            found = measure(_model(config, layers, width), stream, backends, steps)
            for (one, a), (other, b) in itertools.combinations(found.items(), 2):
                largest = max(
                    compare(x, y, step=0, tolerance=0).deviation for x, y in zip(a, b, strict=True)
                )
                print(f"  {one:18} {other:18} {largest:.1e}")


def measure(
    config: RunConfig, stream: BatchStream, backends: dict[str, Backend], steps: int
) -> dict[str, list[Continuation]]:
    """`backend dtype` to what comes next, at three moments of one float32 training."""
    found: dict[str, list[Continuation]] = {}
    first = next(iter(backends.values()))
    with closing(_session(first, config, "float32")) as training:
        for step in range(steps + 1):
            if step in (0, steps // 2, steps):
                for name, ahead in _everywhere(
                    training, config, stream, step=step, backends=backends
                ):
                    found.setdefault(name, []).append(ahead)
            lr = lr_at(step, total_steps=steps + 1, peak_lr=0.008, table=config.schedule)
            training.train_step(stream.batch(step), lr=lr).result()
    return found


def _everywhere(
    training: TrainSession,
    config: RunConfig,
    stream: BatchStream,
    *,
    step: int,
    backends: dict[str, Backend],
) -> Iterator[tuple[str, Continuation]]:
    with closing(training.snapshot()) as snapshot:
        weights = DictSource.collect(snapshot.parameters())
    for name, backend in backends.items():
        for dtype in backend.capabilities().train_dtypes:
            with closing(_session(backend, config, dtype)) as session:
                session.import_parameters(weights)
                yield f"{name} {dtype}", look_ahead(session, stream, step)


def _session(backend: Backend, config: RunConfig, dtype: str) -> TrainSession:
    assert config.model.config is not None
    plan = Plan(4, False, dtype, SEQ_LEN, ROWS)  # type: ignore[arg-type]
    return backend.train_session(config.model.config, session_options(config, backend), plan)


def _model(config: RunConfig, layers: int, width: int) -> RunConfig:
    assert config.model.config is not None
    model = ModelConfig(
        vocab_size=config.model.config.vocab_size, hidden_size=width, intermediate_size=3 * width,
        num_hidden_layers=layers, num_attention_heads=width // 16,
        num_key_value_heads=width // 32, head_dim=16, max_position_embeddings=SEQ_LEN,
    )  # fmt: skip
    return updated(config, "model", config=model)


if __name__ == "__main__":
    main()
