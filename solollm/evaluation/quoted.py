"""Published figures that a result is shown beside. Quoted, not measured here: each row names where
it comes from, and nothing says that the models were asked in the same way."""

from __future__ import annotations

from typing import NamedTuple


class QuotedRow(NamedTuple):
    """A model as its source describes it. None: not given there. Scores in per cent."""

    model: str
    parameters: str
    training: str
    mmlu_5_shot: float | None
    gsm8k_8_shot: float | None
    ms_per_token: float | None
    source: str


# The article: the news article of June 2026 on the tutorial `solo-llm-from-scratch`.
# The card: of the community model Nekochu/nanochat-d24 on Hugging Face, trained on one RTX 5090.
ARTICLE, CARD = "article", "card"

QUOTED_ROWS = (
    QuotedRow("GPT-3.5-turbo", "~175B (est.)", "-", 70.0, 57.1, 15, ARTICLE),
    QuotedRow("TinyLlama 1.1B", "1.1B", "5,000 h A100", 31.2, 12.4, 8, ARTICLE),
    QuotedRow("tutorial 2.7B", "2.7B", "1,200 h RTX 4090", 38.5, 18.9, 12, ARTICLE),
    QuotedRow("+ domain fine-tuning", "2.7B", "1,200 + 200 h", 42.1, 22.3, 12, ARTICLE),
    QuotedRow("nanochat d24, base", "depth 24", "3.8 days RTX 5090", 23.6, 0.0, None, CARD),
    QuotedRow("nanochat d24, SFT", "depth 24", "+ 7.5 h", 35.3, 10.2, None, CARD),
    QuotedRow("nanochat d24, + RL", "depth 24", "+ 5 h", 35.6, 16.5, None, CARD),
)
LEGEND = (
    "quoted, not measured here: article = the news article of June 2026 on the tutorial"
    " solo-llm-from-scratch; card = the model card of Nekochu/nanochat-d24"
)
