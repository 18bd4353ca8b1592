"""What only a real vLLM shows, beside the contract: it dies and comes back, it serves adapters."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from solollm.tokenizer import Tokenizer

pytestmark = pytest.mark.vllm

PROMPT = "def number_7():"
_BACK_SECONDS = 900.0  # its own start-up, on a busy machine


def _is_well(url: str) -> bool:
    return httpx.get(f"{url}/health", timeout=60).status_code == 200


def _until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.parametrize("victim", ["its server", "its engine"])
def test_a_dead_vllm_comes_back(victim: str, serving: Callable[..., Any]) -> None:
    """A server whose vLLM was killed, and that answers 503 from then on; processes left over."""
    server = serving("vllm")
    text, restarts = server.greedy(), server.metric("solollm_engine_restarts")
    top = next(
        child for child in psutil.Process().children() if "api_server" in " ".join(child.cmdline())
    )
    (core, *_) = [child for child in top.children() if "EngineCore" in child.name()]
    killed = time.monotonic()
    (top if victim == "its server" else core).kill()
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)
    assert answer.status_code in (500, 503)
    _until(lambda: not _is_well(server.url), 60)
    assert int(httpx.post(f"{server.url}/v1/completions", json=body).headers["retry-after"]) <= 5
    _until(lambda: _is_well(server.url), _BACK_SECONDS)
    print(f"back after {time.monotonic() - killed:.1f} s")
    assert server.metric("solollm_engine_restarts") == restarts + 1
    assert server.greedy() == text
    assert not core.is_running()
    assert not top.is_running() or top.status() == psutil.STATUS_ZOMBIE


def test_an_adapter_is_served_by_its_name(
    serving: Callable[..., Any], served_checkpoint: Path, served_tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:  # fmt: skip
    """An adapter's name behind which the base model answers."""
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(served_checkpoint, dtype=torch.float32)
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"],
        init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    adapted = peft.get_peft_model(base, config)
    adapted.save_pretrained(tmp_path / "pirate")
    ids = [served_tokenizer.bos_id, *served_tokenizer.encode(PROMPT)]
    with torch.no_grad():
        told = adapted.generate(
            input_ids=torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None,
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            pad_token_id=served_tokenizer.pad_id,
            suppress_tokens=list(range(served_tokenizer.vocab_size, base.config.vocab_size)),
        )[0, len(ids) :].tolist()  # fmt: skip
    assert not set(told) & set(served_tokenizer.stop_ids)
    expected = served_tokenizer.decode(told)
    server = serving("vllm", adapters={"pirate": tmp_path / "pirate"})
    assert [m["id"] for m in httpx.get(f"{server.url}/v1/models").json()["data"]] == [
        "tiny", "pirate",
    ]  # fmt: skip
    assert server.greedy(PROMPT, model="pirate") == expected
    assert server.greedy(PROMPT) != expected
