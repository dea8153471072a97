"""What a table says, in plain sentences and with honest digits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from expunge.audit.subject import Reading

if TYPE_CHECKING:
    from expunge.audit.report import Row

TITLES = {
    "average_gap": "Gap to retraining",
    "average_gap_each": "Gap to each retrained model",
    "tug_of_war": "Tug of war",
    "forget_margin_shift": "Margin shift, forget",
    "forget_margin_distance": "Margin distance, forget",
    "retain_margin_shift": "Margin shift, retain",
    "test_margin_shift": "Margin shift, test",
    "forget_accuracy": "Forget accuracy",
    "retain_accuracy": "Retain accuracy",
    "test_accuracy": "Test accuracy",
    "forgotten_class_accuracy": "Test accuracy, forgotten class",
    "lowest_class_accuracy": "Test accuracy, worst class",
    "forget_loss": "Forget loss",
    "retain_loss": "Retain loss",
    "test_loss": "Test loss",
    "recall": "Recall, 0 retrained to 1 original",
    "membership_auc": "Membership AUC",
    "membership_auc_same_class": "Membership AUC, same class",
    "membership_auc_two_sided": "Membership AUC, two-sided",
    "membership_tpr": "Caught at 1% false alarms",
    "lira": "LiRA",
    "lira_online": "LiRA, online",
    "rmia": "RMIA",
    "ulira": "U-LiRA",
    "ulira_retain": "U-LiRA, retain",
    "loss_attack": "Loss attack, accuracy",
    "attack_confidence": "Called unseen, by confidence",
    "attack_entropy": "Called unseen, by entropy",
    "forget_output_distance": "Output distance, forget",
    "test_output_distance": "Output distance, test",
    "activation_distance": "Activation distance, forget",
    "klom_forget": "KLoM, forget",
    "klom_retain": "KLoM, retain",
    "klom_test": "KLoM, test",
    "forgetting_score": "Forgetting score",
    "zero_retrain_forgetting": "Likeness to untrained networks (ZRF)",
    "cka_forget": "CKA to retrained, forget",
    "cka_test": "CKA to retrained, test",
    "procrustes_forget": "Procrustes distance, forget",
    "procrustes_test": "Procrustes distance, test",
    "knn_forgotten": "Forgotten class by neighbours",
    "probe_forgotten": "Forgotten class by linear probe",
    "prototype_forgotten": "Forgotten class by class mean",
    "knn_downstream": "Downstream accuracy by neighbours",
    "probe_downstream": "Downstream accuracy by linear probe",
    "retraining_agreement": "Agreement with retraining",
    "restoration": "Restored by steering",
    "restoration_as_published": "Restored, as published",
    "memorised_forget_accuracy": "Forget accuracy, most memorised",
    "confusion_error": "Error on the confused classes",
    "confusion_targeted": "Confused with each other",
    "corrected_accuracy": "Accuracy where manipulated",
    "unaffected_accuracy": "Accuracy elsewhere",
    "identity_nomus": "NoMUS",
    "lm_zlib": "Membership AUC, zlib",
    "lm_reference": "Membership AUC, reference model",
    "lm_min_k": "Membership AUC, Min-K",
    "lm_min_k_plus": "Membership AUC, Min-K++",
    "lm_gradient_norm": "Membership AUC, gradient norm",
    "lm_privacy_leakage": "Privacy leakage (MUSE)",
    "lm_written": "Answer tokens written",
    "lm_leak": "Answer tokens, best of samples",
    "lm_in_context": "Gain from questions before",
    "lm_fluency": "Own answers, to retrained models",
    "lm_repetition": "Own answers, repetition",
    "exact_memorisation": "Answer tokens known by heart",
    "extraction_strength": "Answer completed from its start",
    "input_perturbation": "Lead under disturbed inputs",
    "worst_retain": "Worst on retain along the run",
    "worst_test": "Worst on test along the run",
    "stability_gap_retain": "Stability gap, retain",
    "stability_gap_test": "Stability gap, test",
    "recourse_invalidation": "Explanations broken",
    "relearn": "Accuracy while relearning",
    "relearn_loss": "Loss while relearning",
    "relearn_benign": "Forget accuracy, benign tuning",
    "relearn_benign_loss": "Forget loss, benign tuning",
    "anamnesis": "Anamnesis index",
    "linear_mode": "Barrier to the original",
    "quantised_forget_accuracy_int8": "Forget accuracy, 8-bit weights",
    "quantised_forget_accuracy_int4": "Forget accuracy, 4-bit weights",
    "quantised_forget_loss_int8": "Forget loss, 8-bit weights",
    "quantised_forget_loss_int4": "Forget loss, 4-bit weights",
    "pruned_forget_accuracy": "Forget accuracy, pruned",
    "pruned_forget_loss": "Forget loss, pruned",
    "inversion": "Inversion of the update, AUC",
    "seconds": "Time",
    "forward_rows": "Forward passes",
    "backward_rows": "Backward passes",
}
"""Column headings, in the order of columns; a measure that is not here comes after them under its own name."""

PROMISES = (
    "That a reading lies where retrained models lie shows that this measure does not tell them apart. It does not "
    "prove that the examples left no trace: a stronger attack may find one.",
    "Each interval covers 95%, one reading at a time. Among many readings some leave their reference by chance.",
    "The reference is only as good as the retrained models: same recipe, other seeds, none of the forget examples.",
    "The membership AUC has one threshold for all examples and says little about the single most exposed one. LiRA, "
    "RMIA and U-LiRA, where they are given, have one per example, and are as strong as the number of models behind them.",
)


def ordered(rows: Sequence[Row]) -> list[str]:
    """The measures that any row has, in the order of columns."""
    present = {name for row in rows for name in row.readings}
    return [name for name in TITLES if name in present] + sorted(present - TITLES.keys())


def title(name: str) -> str:
    """The heading of a measure."""
    return TITLES.get(name, name.replace("_", " "))


def number(value: float, unit: str = "") -> str:
    """A number with as many digits as an interval of this kind deserves; a dash where there is none."""
    if not math.isfinite(value):
        return "–"
    if unit == "rows":
        return f"{value:,.0f}"
    if unit == "s" and 0 < abs(value) < 1:
        return f"{value:.2g}"
    if unit in ("%", "points", "s"):
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.3g}"


def spread(reading: Reading) -> str:
    """The interval; "" for a number without one, and for one that says nothing."""
    if reading.low == reading.high == reading.value or not (math.isfinite(reading.low) and math.isfinite(reading.high)):
        return ""
    return f"{number(reading.low, reading.unit)} to {number(reading.high, reading.unit)}"


def with_unit(reading: Reading) -> str:
    """Value and unit."""
    gap = "" if reading.unit == "%" else " "
    return f"{number(reading.value, reading.unit)}{gap if reading.unit else ''}{reading.unit}"


def listing(names: Sequence[str]) -> str:
    """a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def summary(rows: Sequence[Row], facts: Mapping[str, Any]) -> str:
    """One paragraph: what was asked, what retraining would give, how the methods stand to it."""
    sentences = [_asked(facts)]
    original, retrain = (next((r for r in rows if r.name == name), None) for name in ("original", "retrain"))
    if original is not None and retrain is not None:
        sentences += _target(original, retrain)
    methods = [row for row in rows if row.kind == "method"]
    groups: dict[str, list[str]] = {}
    for row in methods:
        groups.setdefault(row.verdict, []).append(row.name)
    sentences += [sentence for verdict, names in groups.items() if (sentence := _said(verdict, names))]
    return " ".join(sentences)


def _asked(facts: Mapping[str, Any]) -> str:
    sizes = facts["examples"]
    classes = [f"“{name}”" for name in facts["forgotten_classes"]]
    all_of = f"every one of class{'es' * (len(classes) > 1)} {listing(classes)}" if classes else ""
    of = f", among them {all_of}," if classes else ""
    kept = f"; {sizes['retain']:,} were to be kept" if "retain" in sizes else ""
    return f"{sizes['forget']:,} training examples{of} were to be forgotten{kept}."


def _target(original: Row, retrain: Row) -> list[str]:
    sentences = []
    for name, text in (
        ("forget_accuracy", "are right on {} of the forget examples; the original model is right on {}"),
        ("forget_loss", "have a loss of {} on the forget examples; the original model has {}"),
    ):
        if name in original.readings and name in retrain.readings:
            said = text.format(with_unit(retrain.readings[name]), with_unit(original.readings[name]))
            sentences.append(f"Models retrained without them {said}.")
    gap, level = original.readings.get("average_gap"), retrain.readings.get("average_gap")
    if gap is not None and level is not None:
        where = "no further than that" if gap.verdict == "within" else f"{number(gap.value, 'points')} away"
        sentences.append(
            f"Retrained models differ from each other by {number(level.value, 'points')} points on average; doing "
            f"nothing is {where}."
        )
    return sentences


def _said(verdict: str, names: Sequence[str]) -> str:
    who, many = listing(list(names)), len(names) > 1
    phrases = {
        "forgotten": f"{who} cannot be told from retrained models by these measures",
        "not forgotten": f"{who} forgot too little",
        "over-forgotten": f"{who} forgot too much, or lost what {'they were' if many else 'it was'} to keep",
        "cannot tell": f"whether {who} forgot cannot be told",
        "audit broken": f"this audit cannot judge {who}: it fails its own controls",
        "not judged": f"{who} could not be judged",
    }
    said = phrases.get(verdict, "")
    starts = verdict in ("cannot tell", "audit broken")  # otherwise with a name, which stays as it is
    return f"{said[0].upper() if starts else said[0]}{said[1:]}." if said else ""
