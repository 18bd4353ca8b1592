"""The guard: all filters of its settings, made anew for every answer.

In this order: what the user said is judged before the model says anything; then the answer's
personal data, rules, classifier, and last the repetition, which judges what is really shown.
"""

from __future__ import annotations

from collections.abc import Sequence

from solollm.guard.classifier import Classifier, ClassifierFilter
from solollm.guard.distress import HELP, READ_CHARS, is_distress
from solollm.guard.notices import Notices
from solollm.guard.personal_filter import PersonalData
from solollm.guard.repetition import LoopStop
from solollm.guard.rules import compiled, is_found, rule_filter
from solollm.guard.settings import GuardSettings
from solollm.serving.text_filter import FilterContext, TextFilter

_REFUSAL = "This server does not answer that."


class Guard:
    """A `FilterFactory`. Holds what all answers share: compiled rules, the classifier's process.

    Attributes:
        notices: what it did so far.
    """

    def __init__(
        self, settings: GuardSettings | None = None, *, notices: Notices | None = None
    ) -> None:
        """Raises ConfigError for a pattern or a classifier that cannot be used."""
        self.settings = settings or GuardSettings()
        self.notices = notices or Notices()
        self._rules = [(rule, compiled(rule)) for rule in self.settings.rules]
        table = self.settings.classifier
        self._classifier = Classifier(table) if table.function else None

    def close(self) -> None:
        """End the classifier's process."""
        if self._classifier is not None:
            self._classifier.close()

    def __call__(self, context: FilterContext) -> Sequence[TextFilter]:
        """The filters of one answer."""
        answer = self._fixed_answer(context)
        if answer is not None:
            return [FixedAnswer(answer)]
        settings, notices = self.settings, self.notices
        filters: list[TextFilter] = []
        if settings.personal.enabled:
            table = settings.personal
            said = [m["content"] for m in context.messages] if table.known_is_shown else []
            filters.append(
                PersonalData(notices, action=table.action, kinds=table.kinds, conversation=said)
            )
        filters += [rule_filter(r, made, notices) for r, made in self._rules if r.on == "output"]
        if self._classifier is not None:
            late = settings.classifier.on_timeout == "block"
            filters.append(ClassifierFilter(self._classifier.is_bad, notices, late_is_bad=late))
        if settings.repetition.enabled:
            filters.append(LoopStop(notices))
        return filters

    def _fixed_answer(self, context: FilterContext) -> str | None:
        """What is said instead of the model's answer, if the user's last message asks for that."""
        said = [m["content"] for m in context.messages if m["role"] == "user"]
        message = said[-1][-READ_CHARS:] if said else ""
        table = self.settings.distress
        if table.enabled and is_distress(message, table.phrases):
            self.notices.note("distress", "help lines", "block")
            return table.message or HELP
        for rule, made in self._rules:
            if rule.on == "input" and is_found(rule, made, message):
                self.notices.note("rules", rule.name, rule.action)
                if rule.action == "block":
                    return rule.message or _REFUSAL
        return None


class FixedAnswer(TextFilter):
    """Says what is to be said instead of the model's answer, and ends."""

    def __init__(self, answer: str) -> None:
        self._answer = answer

    def push(self, text: str) -> str:
        return self.finish()

    def finish(self) -> str:
        self.stopped = "content_filter"
        return self._answer
