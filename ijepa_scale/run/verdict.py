"""What a run's health records say in words. Without torch, so that a page of a run is quick to make."""

from typing import Any

from ijepa_scale.config.objective_sections import FIXED_TARGETS
from ijepa_scale.run.records import is_number

# Health: below these the words change. Each is far from what a run that learns has shown, so that a warning means it.
CONSTANT_STD = 0.01  # features vary by 1% of their size: no probe reads more from them than from rounding
STD_FALL = 0.2  # of the first record: five times as alike as at the start
RANK_FALL = 0.7  # of the first record: 0.6 to 0.34 from a third of runs that did not learn on, 9 in one that did
RANK_RECOVERY = 1.2  # of the lowest so far: the early dip is over
KNN_FALL = 6.0  # percent points at least; else two standard errors of the first value
LOSS_RISE = 1.1  # of the lowest so far


def health_verdict(history: list[dict[str, Any]], advice: str = "", *, objective: str = "ijepa") -> str:
    """One line on the features' health, from a run's health records, the first taken at or near initialisation.

    It begins with "healthy", "watch", "likely collapse" or "collapsed", or says that it is too early to tell.
    Used are feature_std, rankme and, if recorded, knn (percent) and loss; a null is as not recorded, save in the last
    record, where it means that the features are not finite. advice: what to do where they collapse. objective:
    its name.
    """
    advice = f": {advice}" if advice else ""
    if not history:
        return "no health record yet"
    last = history[-1]
    std, rank = last["feature_std"], last["rankme"]
    if not (is_number(std) and is_number(rank)):
        return "collapsed: features are not finite: resume an older checkpoint with a lower optimization.lr"
    if std < CONSTANT_STD:
        return f"collapsed: features constant over the images (std {std:.4f}){advice}"
    stds, ranks, knns, losses = (_known(history, key) for key in ("feature_std", "rankme", "knn", "loss"))
    if len(stds) < 2 or len(ranks) < 2:
        return f"first record: feature std {std:.3f}, rank {rank:.1f}; later ones are compared with it"

    facts = [f"feature std {stds[0]:.3f} -> {std:.3f}", f"rank {ranks[0]:.1f} -> {rank:.1f}"]
    if len(knns) > 1:
        facts.append(f"k-NN {knns[0]:.1f}% -> {knns[-1]:.1f}%")
    note = ""
    if len(losses) > 1 and losses[-1] > LOSS_RISE * min(losses):
        normal = "is normal here" if objective not in FIXED_TARGETS else f"from {min(losses):.4f} to {losses[-1]:.4f}"
        note = f"; loss rising {normal}"
    said = ", ".join(facts) + note
    if rank < RANK_FALL * ranks[0]:
        if rank > RANK_RECOVERY * min(ranks):
            return f"watch: rank fell to {min(ranks):.1f} and is rising again: {said}"
        return f"likely collapse: rank is falling: {said}{advice}"
    if std < STD_FALL * stds[0]:
        return f"likely collapse: features grow alike: {said}{advice}"
    if len(knns) > 1 and knns[-1] < knns[0] - max(KNN_FALL, 2 * _knn_error(history)):
        return f"watch: k-NN is below its first value: {said}"
    return f"healthy: {said}"


def _knn_error(history: list[dict[str, Any]]) -> float:
    """The standard error of the first k-NN, in percent points; 0 where it is not known on how many images it was."""
    first = next(record for record in history if is_number(record.get("knn")))
    count, percent = first.get("knn_images", 0), first["knn"]
    return (percent * (100.0 - percent) / count) ** 0.5 if count else 0.0


def _known(history: list[dict[str, Any]], key: str) -> list[float]:
    return [record[key] for record in history if is_number(record.get(key))]
