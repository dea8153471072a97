"""Which shadow model is trained on which examples, and which of them it is then made to forget. Numbers only."""

from __future__ import annotations

import numpy as np

from expunge.core import Key, Refused

OUT, IN, FORGOTTEN = 0, 1, 2  # as in expunge.audit.subject


def halves(models: int, examples: int, key: Key) -> np.ndarray:
    """[models, examples] bool: whether a model is trained on an example; balanced both ways.

    Models come in pairs: one is trained on a random half of the examples, the other on the rest. So each is trained on
    half of them, to one, and each example is IN for exactly half of the models; for an odd number of models, the last
    of which has no partner, for half of them to within a half. The two models of a pair are not independent.

    Args:
        models: >= 2. examples: >= 2. key: of the draws; model 2k and 2k+1 are the same whatever the number of models.
    """
    if models < 2 or examples < 2:
        raise Refused(
            f"shadow models need at least 2 models and 2 examples, found {models} and {examples}: some must be trained "
            f"on an example and some not"
        )
    inside = np.zeros((models, examples), dtype=bool)
    for pair in range((models + 1) // 2):
        chosen = _rng(key.at("half", pair)).permutation(examples)[: examples // 2]
        inside[2 * pair, chosen] = True
        if 2 * pair + 1 < models:
            inside[2 * pair + 1] = ~inside[2 * pair]
    return inside


def arms(inside: np.ndarray, target: np.ndarray, key: Key) -> np.ndarray:
    """[m, n] int8, OUT, IN or FORGOTTEN: what each shadow was trained on and then made to forget, for U-LiRA.

    Target examples (the forget set of the request): of those that a shadow was trained on, half are FORGOTTEN and half
    stay IN. In the first of two consecutive pairs of models (see ``halves``) that half is drawn at random in each model,
    exactly; the second pair forgets those that the first did not. So of m models, m a multiple of 4, exactly m/2 never
    saw a target example, m/4 saw it and forgot it, and m/4 saw it and were made to forget others.

    Fillers: other examples that the shadow was trained on, drawn at random, are forgotten with them, so that its forget
    set has as many examples as the request's, f; but never more than half of those others, so that enough is kept. A
    shadow that was trained on no target example forgets fillers alone. So every model, whichever its arm for an
    example, went through the method, as the attack needs; else it would tell "has been unlearned" from "has not".
    Where the request forgets a whole class or group the fillers are of the others, and the forget sets of the shadows are
    about a quarter target: that is a departure from U-LiRA, which draws its forget sets like the audited one.

    Args:
        inside: [m, n] bool from ``halves``. target: [n] bool, the request's forget examples. key: of the draws.
    """
    states = np.where(inside, np.int8(IN), np.int8(OUT))
    size, chosen = int(target.sum()), np.zeros_like(target)
    for model, seen in enumerate(inside):
        if model % 4 == 0:
            chosen = np.zeros_like(target)
        rng = _rng(key.at("arm", model))
        mine = seen & target
        if model % 4 < 2:
            chosen[rng.permutation(np.flatnonzero(mine))[: (int(mine.sum()) + model % 2) // 2]] = True
            gone = mine & chosen
        else:
            gone = mine & ~chosen
        others = np.flatnonzero(seen & ~target)
        missing = max(0, min(size - int(gone.sum()), len(others) // 2))
        gone[rng.permutation(others)[:missing]] = True
        states[model, gone] = FORGOTTEN
    return states


def _rng(key: Key) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(key.seed))
