"""mlx-lm's own trainer, brought to one shape so that `bench train` can time it.

It is the real `mlx_lm.tuner.trainer.train` with its defaults: its compiled step, its loss, its
batches, its cache cleared after every step. Three things are ours: all parameters train (its "full"
mode leaves out embedding, head and last norm), AdamW has its bias correction, and it reports every
step. What it does otherwise than we do stays, because its users get it: rows are padded to the
longest of a batch, its sort by length has no effect (it measures its dictionaries, whose lengths
are all one), and one padding id per row counts as a target. Nothing here is used in training.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from solollm.architecture import ModelConfig, initial_parameters
from solollm.backend import Batch, Peer
from solollm.config import OptimizerTable

NAME = "mlx-lm trainer"
LONGEST = 2048  # its default `max_seq_length`


def known_peers() -> dict[str, str]:
    """See `Backend.peers`."""
    return {NAME: "" if find_spec("mlx_lm") else "mlx_lm"}


class TrainerPeer(Peer):
    """mlx-lm's trainer, held between its steps.

    It trains in a thread of its own, since MLX's arrays belong to the thread that makes them, and
    asks for its next documents; a step has ended when it asks again.
    """

    def __init__(
        self, model: ModelConfig, table: OptimizerTable, seed: int, dtype: mx.Dtype
    ) -> None:
        """`dtype`: of its weights, in which it then computes."""
        self._model, self._table, self._seed, self._dtype = model, table, seed, dtype
        self._documents: list[dict[str, Any]] = []
        self._batch_size, self._longest = 1, LONGEST
        self._wanted, self._ended = threading.Semaphore(0), threading.Semaphore(0)
        self._failure: BaseException | None = None
        self._losses: list[float] = []
        self._open, self._lr = True, 1e-3
        self._thread = threading.Thread(target=self._train, daemon=True)
        self._thread.start()
        self._wait()

    def step(self, batch: Batch, lr: float) -> float:
        rows = np.concatenate([batch.input_ids, batch.labels[:, -1:]], axis=1)
        self._longest = rows.shape[1]  # else it would pad what is full already
        return self._pass(list(rows), len(rows), lr)[0]

    def read(self, documents: Sequence[np.ndarray], batch_size: int, lr: float) -> list[float]:
        self._longest = LONGEST
        return self._pass(documents, batch_size, lr)

    def _pass(self, documents: Sequence[np.ndarray], batch_size: int, lr: float) -> list[float]:
        self._documents = [{"ids": document.tolist()} for document in documents]
        self._batch_size = batch_size
        self._losses, self._lr = [], lr
        self._wanted.release()
        self._wait()
        return self._losses

    def close(self) -> None:
        self._open = False
        self._wanted.release()
        self._thread.join(timeout=30)

    def _wait(self) -> None:
        self._ended.acquire()
        if self._failure is not None:
            raise self._failure

    def _train(self) -> None:
        try:
            with tempfile.TemporaryDirectory() as folder:
                self._run_trainer(Path(folder))
        except BaseException as error:
            self._failure = error
        self._ended.release()

    def _run_trainer(self, folder: Path) -> None:
        import mlx.optimizers as optimizers
        from mlx_lm.cli_ui import TrainUI
        from mlx_lm.tuner import trainer

        from solollm_mlx.mlx_lm_adapter import build_model

        initial = initial_parameters(self._model, self._seed)
        weights = {name: mx.array(array).astype(self._dtype) for name, array in initial}
        module = build_model(self._model, weights)
        table = self._table
        self._optimizer = optimizers.AdamW(
            self._lr, betas=[table.beta1, table.beta2], eps=table.eps,
            weight_decay=table.weight_decay, bias_correction=True,
        )  # fmt: skip
        arguments = trainer.TrainingArgs(
            iters=10**9,
            steps_per_report=1,
            steps_per_save=10**9,
            batch_size=1,
            adapter_file=str(folder / "adapters.safetensors"),
        )
        # Any rank but the first is silent, and draws no progress bar in a thread of its own.
        setattr(trainer, "TrainUI", lambda iters, rank: TrainUI(iters, rank=1))  # noqa: B010
        trainer.train(
            module, self._optimizer, [], args=arguments,
            iterate_batches=self._batches, training_callback=self._listener(),
        )  # fmt: skip

    def _listener(self) -> Any:
        """mlx-lm's training callback, for the loss of each step."""
        from mlx_lm.tuner.callbacks import TrainingCallback

        peer = self

        class Listener(TrainingCallback):
            def on_train_loss_report(self, train_info: dict[str, float]) -> None:
                peer._losses.append(float(train_info["train_loss"]))

        return Listener()

    def _batches(self, **_: Any) -> Iterator[Any]:
        """What the trainer iterates over: its own batches of whatever documents are handed over."""
        from mlx_lm.tuner.datasets import CacheDataset
        from mlx_lm.tuner.trainer import iterate_batches

        while True:
            self._ended.release()
            self._wanted.acquire()
            if not self._open:
                return
            self._optimizer.learning_rate = self._lr
            data = CacheDataset(_Encoded(self._documents))
            yield from iterate_batches(data, self._batch_size, self._longest)


class _Encoded:
    """Documents that are token ids already, as mlx-lm's datasets look."""

    def __init__(self, documents: list[dict[str, Any]]) -> None:
        self._documents = documents

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._documents[index]

    def process(self, document: dict[str, Any]) -> tuple[list[int], int]:
        return document["ids"], 0
