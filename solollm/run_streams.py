"""The data of a run as batch streams: training (one stage or two) and held-out."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from solollm.config import FinetuneTable, RunConfig
from solollm.data.shards import Split, corpus_files, read_index, verify_corpus
from solollm.data.stream import BatchStream, EpochStream, StagedStream, StepStream, open_stream
from solollm.errors import ConfigError, DataError
from solollm.finetune.packing import SampleStream
from solollm.finetune.preference import PairStream
from solollm.finetune.rollouts import PromptStream
from solollm.finetune.samples import SampleSplit, read_samples
from solollm.schedule import decay_start


class RunStreams(NamedTuple):
    """`first` is the training stream, or its first stage; no `validation`: nothing is held out."""

    train: StepStream
    first: EpochStream
    validation: EpochStream | None


def open_split(
    config: RunConfig, corpus: str, split: Split, *, batch_size: int, seq_len: int
) -> BatchStream:
    """One split of a corpus, read as the config says."""
    return open_stream(
        Path(corpus), split=split, seq_len=seq_len, batch_size=batch_size,
        seed=config.train.seed, mask_documents=config.data.mask_documents,
    )  # fmt: skip


def open_streams(config: RunConfig, *, batch_size: int, seq_len: int) -> RunStreams:
    """The streams of a config whose number of steps is known.

    Raises:
        ConfigError: no corpus there, or a decay corpus where nothing decays.
        DataError: no training document. IntegrityError: a damaged corpus.
    """
    if config.finetune is not None:
        return _open_samples(config, config.finetune, batch_size=batch_size, seq_len=seq_len)

    def opened(corpus: str, split: Split) -> BatchStream:
        return open_split(config, corpus, split, batch_size=batch_size, seq_len=seq_len)

    first = opened(config.data.corpus, "train")
    train: StepStream = first
    if config.data.decay_corpus:
        start = _decay_start(config)
        second = opened(config.data.decay_corpus, "train")
        train = StagedStream([(0, first), (start, second)]) if start else second
    try:
        validation = opened(config.data.corpus, "validation")
    except DataError:  # a corpus built without held-out documents is trained on all the same
        validation = None
    return RunStreams(train, first, validation)


def prove_corpora(config: RunConfig) -> None:
    """Read every byte of a run's corpora, before it trains on them: a disk that has changed one
    since gives other steps, and nobody would know. The samples of a fine-tuning are proven as they
    are read.

    Raises:
        IntegrityError: names the first file that is not what was built.
    """
    if config.finetune is None:
        for corpus in filter(None, (config.data.corpus, config.data.decay_corpus)):
            verify_corpus(Path(corpus))


def corpora_bytes(config: RunConfig, corpus: Path | None = None) -> int:
    """What `prove_corpora` reads; `corpus` is where the first one lies, if not where the config
    says."""
    places = [corpus or Path(config.data.corpus)]
    if config.data.decay_corpus:
        places.append(Path(config.data.decay_corpus))
    return sum(
        path.stat().st_size for place in places for path in corpus_files(place, read_index(place))
    )


def _open_samples(
    config: RunConfig, table: FinetuneTable, *, batch_size: int, seq_len: int
) -> RunStreams:
    """The streams of a fine-tuning: `data.corpus` is the folder of its samples."""
    samples = read_samples(Path(config.data.corpus))
    kind = {"sft": SampleStream, "dpo": PairStream, "grpo": PromptStream}[table.objective]
    if table.objective == "grpo":
        batch_size //= table.grpo.group_size  # prompts: each becomes that many rows

    def opened(split: SampleSplit) -> SampleStream:
        stream = kind(
            samples, split, seq_len=seq_len, batch_size=batch_size, seed=config.train.seed,
            packing=table.packing and table.objective == "sft",
        )  # fmt: skip
        if isinstance(stream, PairStream):
            stream.table = table.dpo
        return stream

    train = opened("train")
    held_out = opened("held_out") if samples.held_out.num_samples else None
    return RunStreams(train, train, held_out)


def _decay_start(config: RunConfig) -> int:
    steps = config.train.steps or 0
    start = decay_start(steps, config.schedule)
    if config.schedule.name != "wsd" or start >= steps:
        raise ConfigError(
            "data.decay_corpus is set, but this schedule has no decay stage for it",
            why=f"schedule.name is {config.schedule.name}, decay_fraction"
            f" {config.schedule.decay_fraction}",
            fix="use --set schedule.name=wsd with a decay_fraction above 0",
        )
    return start
