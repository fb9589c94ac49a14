# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""Random views of texts: words exchanged, or words left out.

Those of the four operations of EDA (Wei and Zou, EMNLP-IJCNLP 2019; CleanCLIP edits captions so) that need no thesaurus.
"""

from __future__ import annotations

import torch


# Share of a text's words that is edited (EDA's α).
_EDITED = 0.1


def edited(text: str, generator: torch.Generator) -> str:
    """A view of a text: either a tenth of its words, one at least, change places with another each, or each word is left out
    with a probability of a tenth. A single word stays; so does one, if all were to go.

    Args:
        text (`str`): A text; words are what stands between white space.
        generator (`torch.Generator`): Of the draws, on CPU.
    """
    words = text.split()
    if len(words) < 2:
        return text
    if torch.rand(1, generator=generator).item() < 0.5:
        for _ in range(max(round(_EDITED * len(words)), 1)):
            i, j = torch.randperm(len(words), generator=generator)[:2].tolist()
            words[i], words[j] = words[j], words[i]
        return " ".join(words)
    draws = torch.rand(len(words), generator=generator).tolist()
    kept = [word for word, draw in zip(words, draws, strict=True) if draw >= _EDITED]
    return " ".join(kept or [words[max(range(len(words)), key=draws.__getitem__)]])
