"""Guardrails: filters between a model's text and its reader, light enough to run on every answer.

`guard` puts them together; each file beside it is one of them. They see the text as it streams and
hold back no more than they must (`solollm.serving.text_filter` is the seam): what they let through
does not depend on how the text came in pieces. `measurement` says how good they are. They are
filters that can be measured, and no promise that what passes is safe.
"""
