"""When structure and texture are decided, by exchanging the label on the way."""

from freqgate_dit import report_plots
from freqgate_dit.training.decisions import FACTORS, KINDS, LEAST_CHANGE, PREDICTED, swap_labels
from freqgate_dit.training.report.page import Section
from freqgate_dit.training.report.subject import LEAST_SHOWN, Subject


SAME_DECISION = 0.5
LEAST_ACCURACY = 0.97  # of the classifier, for levels to mean anything
EXCHANGES = {
    "swap": "Share of images that show the first label's structure, or texture, when the second label takes its place "
    "at a noise level: far left from the start, far right hardly at all.",
    "insertion": "The same, begun without a label; the label is told from the noise level on. Share of images that do "
    "not show what it says.",
    "withdrawal": "The same, with a label that is withdrawn at the noise level. Share of images that show what it "
    "said.",
}


def later(difference) -> str:
    """By how much the texture is decided later, in words."""
    words = {1: "later than structure", -1: "earlier than structure", 0: "about as late as structure"}
    side_of = words.get(side(difference, 0.0), "earlier or later than structure, undecided")
    return f"{side_of}: {in_words(difference)}"


def in_words(difference) -> str:
    return f"{difference.estimate:+.2f} (95 % {difference.low:+.2f} to {difference.high:+.2f}, over pairs)"


def decision_section(subject: Subject) -> Section:
    """When structure and texture are decided, by exchanging the label on the way."""
    title = "When structure and texture are decided"
    if not subject.has_factors:
        reading = (
            "Left out: this needs labels whose factors are known, those of the built-in data (`dataset: "
            f"shapes_textures`), and {subject.why_no_factors}."
        )
        return Section(title, [reading])
    classifier, accuracy = subject.classifier
    told = f"{accuracy['structure']:.1%} of structures and {accuracy['texture']:.1%} of textures"
    if min(accuracy.values()) < LEAST_ACCURACY:
        reading = (
            f"Left out: the classifier that reads the images is right in {told} of held-out real images, and levels "
            f"need {LEAST_ACCURACY:.0%} of both."
        )
        return Section(title, [reading])
    section = Section(title, [f"Images are read by a classifier that is right in {told} of held-out real images."])
    for kind in KINDS if subject.has_null_condition else KINDS[:1]:
        swaps = swap_labels(
            subject.pipe,
            classifier,
            subject.num_pairs,
            subject.num_levels,
            subject.steps,
            kind,
            subject.seed,
            subject.batch_size,
            subject.world,
        )
        shown = {factor: swaps.shown(factor) for factor in FACTORS}
        section.tables.setdefault("shown", []).append({"kind": kind, **shown})
        if min(shown.values()) < LEAST_SHOWN:
            section.reading.append(
                f"No level can be given: only {shown['structure']:.0%} of the images show the structure of either "
                f"label, and {shown['texture']:.0%} the texture. Train for longer first."
            )
            break
        still = [factor for factor in FACTORS if swaps.change(factor) < LEAST_CHANGE]
        if still:
            section.reading.append(
                f"Label {kind}: no level can be given, as the {' and the '.join(still)} of the images is hardly moved "
                "by the noise level of the exchange."
            )
            continue
        levels = {factor: swaps.level(factor) for factor in FACTORS}
        shares = {factor: swaps.share(factor) for factor in FACTORS}
        difference = swaps.difference()
        section.show(
            f"label_{kind}",
            report_plots.decision_figure(swaps.log_snr, shares, levels, f"Label {kind}"),
            f"{EXCHANGES[kind]} Structure turns at a log-SNR of {levels['structure']:+.2f}, texture at "
            f"{levels['texture']:+.2f} (dashed), texture {later(difference)}.",
        )
        section.tables[f"label_{kind}"] = [
            {"log_snr": float(level), **{factor: float(shares[factor][i]) for factor in FACTORS}}
            for i, level in enumerate(swaps.log_snr)
        ]
        row = {
            "world": subject.world,
            "kind": kind,
            **levels,
            "difference": difference.estimate,
            "low": difference.low,
            "high": difference.high,
            "of_data": subject.data_difference,
        }
        section.tables.setdefault("levels", []).append(row)
        section.shown = ("levels",)
        if kind == "swap":
            _read_swap(section, subject, levels, difference)
    return section


def side(interval, centre: float, least: float = 0.0) -> int | None:
    """Of an interval: 1 above `centre` by more than `least`, -1 below it by more than that, otherwise 0 where it is
    within `SAME_DECISION` of it, `None` undecided."""
    low, high = interval.low - centre, interval.high - centre
    if low > least or high < -least:
        return 1 if low > least else -1
    return 0 if -SAME_DECISION < low and high < SAME_DECISION else None


def _read_swap(section: Section, subject: Subject, levels: dict, difference):
    predicted, of_data = PREDICTED[subject.world], subject.data_difference
    interval = in_words(difference)
    section.reading.append(
        f"{subject.num_pairs} pairs of labels, exchanged at {subject.num_levels} noise levels. Structure is decided "
        f"at a log-SNR of {levels['structure']:+.2f}, texture at {levels['texture']:+.2f}; difference {interval}. The "
        "interval is of this one model's samples, not of training."
    )
    # Where a sign is predicted, any difference of that sign will do; where none is, only one that is not small.
    found = side(difference, 0.0, 0.0 if predicted else SAME_DECISION)
    names = {1: "texture after structure", -1: "texture before structure", 0: "both at about the same level"}
    if found is None:
        verdict = "Undecided: more pairs would tell."
    else:
        verdict = (
            f"Found: {names[found]}. That is {'as' if found == predicted else 'other than'} predicted for the world "
            f"'{subject.world}' if lower frequencies are decided first ({names[predicted]})."
        )
    section.reading.append(verdict)
    first = "The factor of the lower frequency is decided first" if predicted else "Neither factor is decided first"
    section.claim(
        f"{first} (world '{subject.world}': {names[predicted]}).",
        None if found is None else found == predicted,
        f"texture minus structure {interval}",
    )
    if of_data is None:
        return
    beyond = side(difference, of_data, SAME_DECISION)
    compared = {
        1: "the exchange finds the texture later still, compared with the structure",
        -1: "the exchange finds the texture earlier than that, compared with the structure",
        0: "the exchange finds the same",
        None: "whether the exchange finds the same is undecided, more pairs would tell",
    }[beyond]
    section.reading.append(
        f"The noisy images themselves tell the two apart by {of_data:+.2f}, whatever the denoiser: {compared}. "
        "The two need not agree: an ideal denoiser would follow an exchanged label to the end, so "
        "this measures for how long a network can still be turned. What of a factor it uses, and when, is in the "
        "section before."
    )
