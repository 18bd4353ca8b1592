"""kill -9 at random moments, inside saves too: the run ends in the bits of an undisturbed one."""

from __future__ import annotations

from pathlib import Path

import pytest

from solollm.errors import BackendError
from solollm.horizon import updated
from solollm.resume_proof import Life, ResumeProof, prove_resume, tiny_config
from solollm.tokenizer import Tokenizer

pytest.importorskip("torch")


def test_a_run_killed_five_times_equals_an_undisturbed_one(
    small_corpus: Path, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Guards against anything that a crash may cost beyond the steps since the last save."""
    config = tiny_config(small_corpus, small_tokenizer.padded_vocab_size, steps=48)
    for seed in (3, 4, 5):  # where the kills land is chance: now and then none proves enough
        seen: list[Life] = []
        folder = tmp_path / str(seed)
        folder.mkdir()
        proof = prove_resume(
            config, folder, kills=5, seed=seed, start_method="forkserver", on_life=seen.append
        )
        assert proof.is_equal, proof
        assert proof.straight_digest == proof.killed_digest
        assert proof.losses_equal
        assert (proof.steps, len(proof.lives)) == (48, 5)
        assert list(proof.lives) == seen
        if proof.kills_in_save >= 1 and max(life.start_step for life in seen) > 0:
            return
    pytest.fail("no kill has landed in a save, or no life has gone on from a checkpoint")


def test_a_training_that_fails_is_no_proof(
    small_corpus: Path, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Guards against taking a run that crashed by itself for one that was killed."""
    config = tiny_config(small_corpus, small_tokenizer.padded_vocab_size, steps=8)
    broken = updated(config, "data", corpus=str(tmp_path / "nothing"))
    with pytest.raises(BackendError, match=r"ended by itself \(exit code 1\)"):
        prove_resume(broken, tmp_path, kills=1, start_method="forkserver")


@pytest.mark.parametrize(
    ("killed_digest", "losses_equal"), [("b", True), ("a", False)], ids=["state", "losses"]
)
def test_any_difference_is_unequal(killed_digest: str, losses_equal: bool) -> None:
    """Guards against a proof that cannot fail."""
    assert not ResumeProof(9, (), "a", killed_digest, losses_equal).is_equal
    assert ResumeProof(9, (), "a", "a", True).is_equal
