"""Choose among measured settings, and give the reasons."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cadsurgery.support.errors import CadError, first_line
from cadsurgery.tasks.judging import FEW, FOUND, Judgement, estimate, median_time, time_error
from cadsurgery.tasks.measuring import AGREEMENT, ERROR, FIDELITY
from cadsurgery.tasks.recommend.report import WORDS, Requirement, SettingRow, change_in_words
from cadsurgery.tasks.recommend.settings import Candidates

LOOK_EVERY = 5  # pictures after which settings are dropped
_FASTER = 0.97  # of the time
# Standard errors by which another setting is better beyond doubt, after so many pictures: Student's t at one in 1,000,
# because each setting is compared with each other one again and again, and the errors of few pictures are uncertain.
_BEYOND_DOUBT = ((20, 3.6), (10, 4.3), (LOOK_EVERY, 7.2))
_WORTH = 0.95  # of the time of the network as given: what takes longer is no gain
_AS_FAST = 1.03  # of the time of the fastest: a simpler setting is as fast
# Of the network as given: the same network on so much smaller pictures cannot be slower.
_CLEARLY_LESS_WORK = 0.6
_TOLD = 3  # doubts in the report
_DECIDED = 1.64  # standard errors: nine in ten
_SIMPLE = ("given", "compiled", "size", "dense", "adaptive")  # the simplest first
_MOST_IMAGES = 10_000


@dataclass(frozen=True)
class Chosen:
    """The recommended row, the reasons, and the number of pictures that would decide; None if there is no doubt.

    Where the times do not decide (`is_decided`), the row is that of the network as given.
    """

    row: SettingRow
    reasons: tuple[str, ...]
    images_needed: int | None = None
    is_decided: bool = True


def is_beaten(ours: Sequence[Judgement], others: Iterable[Sequence[Judgement]], measure: str) -> bool:
    """True if another setting is faster, and better beyond doubt.

    Args:
        ours: judgements of the setting, on `LOOK_EVERY` pictures at least.
        others: those of other settings on the same pictures; the setting itself may be among them.
        measure: measure of quality.
    """
    sure = next(errors for pictures, errors in _BEYOND_DOUBT if len(ours) >= pictures)
    faster = (theirs for theirs in others if median_time(theirs) < _FASTER * median_time(ours))
    compared = (estimate(theirs, ours, measure) for theirs in faster)
    return any(gain.change > sure * gain.error for gain in compared)


def rows_of(
    candidates: Candidates,
    judged: Mapping[str, Sequence[Judgement]],
    macs: Mapping[str, int],
    measure: str,
) -> tuple[SettingRow, ...]:
    """Return the rows of all measured settings, the network as given first; those on the front are marked."""
    given = judged[candidates.settings[0].name]
    rows: list[SettingRow] = []
    for setting in candidates.settings:
        ours = judged.get(setting.name)
        if not ours or setting.name not in macs:
            continue
        values: dict[str, Any] = dict.fromkeys((AGREEMENT, FIDELITY, "loss"))
        if measure != ERROR:
            fidelity = estimate(ours, given, FIDELITY)
            values |= {AGREEMENT: estimate(ours, given, AGREEMENT).value, FIDELITY: fidelity.value}
            if measure != FOUND:
                error = 0.0 if len(ours) < 2 else fidelity.error
                values["loss"] = expected_loss(fidelity.value, error, has_floor=setting.coarsest > 0)
        quality = estimate(ours, given, measure)
        if rows:  # of settings that were dropped, whose first pictures may be easier than the others
            better = -1 if measure == ERROR else 1
            quality = replace(quality, value=rows[0].quality.value + better * quality.change)
        rows.append(
            SettingRow(
                setting,
                quality,
                median_time(ours),
                macs[setting.name],
                time_error=time_error(ours, given),
                is_complete=len(ours) == len(given),
                **values,
            )
        )
    return tuple(replace(row, is_on_front=_is_on_front(row, rows)) for row in rows)


def _is_on_front(row: SettingRow, rows: Sequence[SettingRow]) -> bool:
    """True if no other setting is faster, or as fast, and at least as good; the change counts, which is of the same
    pictures."""
    return row.is_complete and not any(
        other.milliseconds <= row.milliseconds and other.quality.change >= row.quality.change
        for other in rows
        if other is not row
    )


def choose(
    rows: Sequence[SettingRow], request: Requirement, measure: str, refusal: CadError | None = None
) -> Chosen:
    """Choose a setting: the fastest that keeps enough, or the best that is fast enough.

    Among settings whose quality cannot be told apart and that are as fast, the simplest is chosen: the network as given
    before smaller pictures, these before another output stride, this before a conversion.

    Args:
        rows: the network as given first.
        request: condition on the choice.
        measure: measure of quality.
        refusal: error of the conversion, if the network cannot be converted.
    """
    given = rows[0]
    complete = [row for row in rows if row.is_complete]
    if request.at_most is not None:
        able = [row for row in complete if row.milliseconds <= request.at_most]
        if not able:
            fastest = min(complete, key=lambda row: row.milliseconds)
            told = f"Nothing takes {request.at_most:g} ms or less: the fastest is {fastest.name}."
            return Chosen(fastest, (told, *_about_few(rows)))
        best = max(able, key=lambda row: row.quality.change)
        chosen = _simplest(best, able, slower=math.inf)
    else:
        able = [row for row in complete if row is given or keeps(row, given, request, measure)]
        fastest = min(able, key=lambda row: row.milliseconds)
        chosen = _simplest(fastest, able, slower=_AS_FAST)
        if chosen.milliseconds > _WORTH * given.milliseconds:
            chosen = given
    nothing_is_faster = chosen is given and request.at_most is None
    if doubts := _doubts_about_times(able if nothing_is_faster else [chosen], rows):
        return Chosen(given, (*doubts, *_about_few(rows)), is_decided=False)
    reasons = [_headline(chosen, given), *_why(chosen, rows, request, measure)]
    if refusal is not None:
        reasons.append(f"It cannot be converted: {first_line(refusal)}")
    if measure == FIDELITY:
        reasons.append(
            f"Without labels, mIoU is estimated from fidelity (typical error {100 * _LEFT:.0f} %). The expected loss "
            "plus its error has to stay within the bounds. Labels decide (--labels)."
        )
    needed = None if request.keep is None else _images_needed(chosen, rows, request, measure)
    if needed is not None:
        count = f"about {needed:,}" if needed < _MOST_IMAGES else f"more than {_MOST_IMAGES:,}"
        told = f"These {given.quality.images} pictures leave doubt whether a faster or safer setting is right"
        reasons.append(f"{told}: {count} would decide.")
    return Chosen(chosen, (*reasons, *_about_few(rows)), needed)


def _simplest(best: SettingRow, able: Sequence[SettingRow], slower: float) -> SettingRow:
    """Return the simplest setting that is as good as the best one within the error, and as fast up to a factor."""

    def is_as_good(row: SettingRow) -> bool:
        error = max(
            0.0 if math.isnan(setting.quality.error) else setting.quality.error for setting in (row, best)
        )
        return row.quality.change >= best.quality.change - error

    alike = [
        row
        for row in able
        if row is best or (row.milliseconds <= slower * best.milliseconds and is_as_good(row))
    ]
    return min(alike, key=lambda row: (_SIMPLE.index(row.setting.kind), row.milliseconds))


def keeps(row: SettingRow, given: SettingRow, request: Requirement, measure: str) -> bool:
    """True if a setting keeps the share of the quality that is asked for.

    Without labels the loss of mIoU is only expected. It has to stay within its bounds together with its standard error,
    because more pictures do not make the prediction from fidelity more certain.
    """
    above, error = margin(row, given, request, measure)
    return above >= (error if measure == FIDELITY else 0)


def margin(row: SettingRow, given: SettingRow, request: Requirement, measure: str) -> tuple[float, float]:
    """Return how far a setting's quality is above the share that is to be kept, and the standard error of that."""
    keep = request.keep or 0.0
    if measure == FIDELITY and row.loss is not None:
        lost, error = row.loss
        return (1 - keep) - lost, error
    of_given = 1.0 if measure == ERROR else given.quality.value
    return (1 - keep) * of_given + row.quality.change, row.quality.error


def _images_needed(
    chosen: SettingRow, rows: Sequence[SettingRow], request: Requirement, measure: str
) -> int | None:
    """Return the number of pictures that would decide if the choice keeps enough and faster settings do not; None if
    the measured pictures decide."""
    given, most = rows[0], 0
    for row in rows:
        is_asked = row is chosen or (row.is_complete and row.milliseconds < _WORTH * chosen.milliseconds)
        if row is given or not is_asked:
            continue
        above, error = margin(row, given, request, measure)
        if measure == FIDELITY and row.balanced_fidelity is not None:
            has_floor = row.setting.coarsest > 0
            above -= error
            error = _error_by_pictures(row.balanced_fidelity, row.quality.error, has_floor=has_floor)
        if math.isnan(error) or abs(above) >= _DECIDED * error:
            continue
        needed = row.quality.images * (_DECIDED * error / max(abs(above), 1e-9)) ** 2
        most = max(most, min(_MOST_IMAGES, math.ceil(needed)))
    return most or None


def _doubts_about_times(deciding: Sequence[SettingRow], rows: Sequence[SettingRow]) -> list[str]:
    """Return sentences on times that contradict the work, or that vary more than they differ; none if they decide.

    Args:
        deciding: the settings whose times the choice depends on.
        rows: all settings, the network as given first.
    """
    given = rows[0]
    disturbed = [
        f"{row.name} takes {row.milliseconds / given.milliseconds:.2f} of the time of the network as given, with "
        f"{row.macs / max(1, given.macs):.2f} of its work."
        for row in rows
        if row.setting.kind == "size"
        and row.macs <= _CLEARLY_LESS_WORK * given.macs
        and row.milliseconds > _AS_FAST * given.milliseconds
    ]
    uncertain: list[str] = []
    for row in deciding:
        difference = abs(1 - row.milliseconds / given.milliseconds)
        if row is not given and _DECIDED * (row.time_error or 0.0) > max(difference, 1 - _WORTH):
            uncertain.append(
                f"{row.name} takes {row.milliseconds / given.milliseconds:.2f} (±{row.time_error:.2f}) of the time of "
                "the network as given: the error is larger than the difference."
            )
    if not disturbed and not uncertain:
        return []
    told = "The machine is too busy to decide." if disturbed else "The times of these pictures do not decide."
    advice = "Stop other programs, and measure again in another folder (--output), with more pictures."
    return [told, *[*disturbed, *uncertain][:_TOLD], advice]


def _headline(chosen: SettingRow, given: SettingRow) -> str:
    time = f"{chosen.milliseconds / given.milliseconds:.2f} of the time of the network as given"
    if chosen.setting.kind == "adaptive":
        return f"Convert it: {chosen.name}. It takes {time} and {chosen.macs / max(1, given.macs):.2f} of its MACs."
    if chosen is given:
        return "Do not convert this network: use it as given."
    if chosen.setting.kind == "compiled":
        return f"Do not convert this network: use it by torch.compile, at {time}."
    setting, scale = chosen.setting, chosen.setting.scale
    where = f"at output stride {setting.stride} everywhere" if setting.kind == "dense" else ""
    how = f"on pictures {scale:g} times as large" if scale != 1 else ""
    return (
        f"Do not convert this network: use it {' and '.join(filter(None, (where, how)))}. That takes {time}."
    )


def _why(chosen: SettingRow, rows: Sequence[SettingRow], request: Requirement, measure: str) -> list[str]:
    given = rows[0]
    told: list[str] = []
    if chosen is not given:
        told.append(
            f"{WORDS[measure]} changes by {_in_points(chosen, measure)}{_expectation(chosen, measure)}."
        )
    others = [row for row in rows if row.setting.kind == "adaptive" and row is not chosen]
    if not others:
        return told
    if chosen.setting.kind != "adaptive":
        if request.keep is not None:
            able = [row for row in others if keeps(row, given, request, measure)]
            if able:
                best = min(able, key=lambda row: row.milliseconds)
                told.append(
                    f"The fastest conversion that keeps {request.keep:g} of the quality is {best.name}: "
                    f"{best.milliseconds / given.milliseconds:.2f} of the time."
                )
            else:
                best = max(others, key=lambda row: row.quality.change)
                told.append(
                    f"No conversion keeps {request.keep:g} of the quality; the best, {best.name}, changes it by "
                    f"{_in_points(best, measure)}."
                )
        dearest = min(others, key=lambda row: row.macs)
        if dearest.macs > given.macs:
            told.append(
                f"A conversion makes the maps of this network finer: at least {dearest.macs / max(1, given.macs):.1f} "
                "times its work."
            )
    else:
        rivals = [row for row in rows if row.setting.kind in ("compiled", "size", "dense")]
        able = [row for row in rivals if row.milliseconds <= 1.1 * chosen.milliseconds]
        if able:
            rival = max(able, key=lambda row: row.quality.change)
            told.append(
                f"The best without a conversion in that time is {rival.name}: {_in_points(rival, measure)} at "
                f"{rival.milliseconds / given.milliseconds:.2f} of the time."
            )
    return told


def _in_points(row: SettingRow, measure: str) -> str:
    return f"{change_in_words(row, measure, ' (±{:.2f})')} points"


def _expectation(row: SettingRow, measure: str) -> str:
    if measure != FIDELITY or row.loss is None:
        return ""
    return f"; on labels {-100 * row.loss[0]:+z.1f} % (±{100 * row.loss[1]:.1f}) of its mIoU are expected"


def _about_few(rows: Sequence[SettingRow]) -> list[str]:
    images = rows[0].quality.images
    if images >= FEW:
        return []
    errors = [row.quality.error for row in rows[1:] if not math.isnan(row.quality.error)]
    if not errors:
        return ["One picture is enough for timing, not for comparing quality: give 10 or more."]
    return [
        f"{images} pictures: differences of quality below {200 * max(errors):.1f} points cannot be seen; give {FEW} or "
        "more."
    ]


# -- the loss that fidelity lets expect ------------------------------------------------------------------

# How a loss of fidelity relates to a loss of mIoU, for pictures without labels.
#
# Measured on three trained networks, one of them at two output strides, with all settings of `recommend` on 50 to 60
# labelled pictures each: smaller and larger pictures, other output strides, conversions. The share of mIoU that a
# setting loses is about 1.17 (1 - fidelity)^3, whatever the setting. Fitted on the other networks, the relation misses
# the losses of CamVid's MobileNetV2 by .021 of its mIoU (root mean square), of ESPNet by .011, of VOC's DeepLab by .031
# at output stride 8 and by .021 at 16, where the measured losses themselves have errors of .009, .007, .031 and .030:
# docs/currency.txt, by `python -m benchmarks.currency DATA FOLDER --pictures 60 --minutes 90`.
#
# Floors lose more: ESPNet loses .61 of its lack of fidelity on CamVid (docs/currency.txt), since what a floor changes
# is not beside boundaries alone. So for floors the whole lack of fidelity is expected to be lost.
#
# Why a power: a small loss of fidelity is of pixels beside boundaries, where the network as given is wrong about as
# often as the setting, and labels see little of it; a large one is of whole objects.
_SCALE, _POWER = 1.17, 3
_LEFT = 0.02  # of mIoU: what the relation misses on a network that it was not fitted on


def expected_loss(fidelity: float, error: float, *, has_floor: bool = False) -> tuple[float, float]:
    """Return the share of mIoU that is expected to be lost, and the standard error of that.

    Args:
        fidelity: mean IoU against the classes of the network as given, 0..1.
        error: standard error of the fidelity.
        has_floor: true for a conversion with floors.
    """
    by_pictures = _error_by_pictures(fidelity, error, has_floor=has_floor)
    if has_floor:
        return 1 - fidelity, by_pictures
    lost = _SCALE * (1 - fidelity) ** _POWER
    return lost, (by_pictures**2 + min(_LEFT, lost) ** 2) ** 0.5


def _error_by_pictures(fidelity: float, error: float, *, has_floor: bool) -> float:
    """Return the part of the standard error of an expected loss that more pictures make smaller."""
    return error if has_floor else _SCALE * _POWER * (1 - fidelity) ** (_POWER - 1) * error
