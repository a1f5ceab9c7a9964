import pytest

from dynmoe_ds.adaptation import AdaptationConfig, RecordingWindow, add_records
from tests.adaptation.examples import records


@pytest.mark.parametrize(
    ("every", "window", "first", "counted"),
    [
        (6, 2, None, {6: [5, 6], 12: [11, 12], 18: [17, 18]}),
        (6, 6, None, {6: [1, 2, 3, 4, 5, 6], 12: [7, 8, 9, 10, 11, 12], 18: [13, 14, 15, 16, 17, 18]}),
        (9, 1, None, {9: [9], 18: [18]}),
        (1, 1, None, {step: [step] for step in range(1, 19)}),
        (6, 2, 4, {4: [3, 4], 10: [9, 10], 16: [15, 16]}),  # from 1/3 to 2/3 of every 6
        (6, 2, 13, {13: [12, 13]}),
        (6, 6, 7, {7: [2, 3, 4, 5, 6, 7], 13: [8, 9, 10, 11, 12, 13]}),
        (1, 1, 17, {17: [17], 18: [18]}),
    ],
)
def test_which_steps_count(every, window, first, counted):
    recording = RecordingWindow(AdaptationConfig(every_steps=every, window_steps=window, first_step=first))
    found = {}
    for step in range(1, 19):
        # One bit per step shows in the sum which steps are in it.
        recording.add(step, {"layer": records([2**step], num_tokens=1)})
        if recording.is_due(step):
            total = int(recording.take()["layer"].tokens_per_slot)
            found[step] = [s for s in range(1, 19) if total & 2**s]
    assert found == counted


@pytest.mark.parametrize(
    ("every", "window", "first"), [(6, 2, None), (6, 6, None), (9, 1, None), (1, 1, None), (6, 2, 4), (6, 2, 13)]
)
def test_what_lies_ahead_is_what_happens(every, window, first):
    recording = RecordingWindow(AdaptationConfig(every_steps=every, window_steps=window, first_step=first))
    for step in range(1, 19):
        assert recording.covers(step) == (recording.end(step) - step < window)
        assert recording.end(step) == min(s for s in range(step, 40) if recording.is_due(s))


def test_taking_empties_the_window():
    recording = RecordingWindow(AdaptationConfig(every_steps=1, window_steps=1))
    recording.add(1, {"layer": records([1])})
    assert list(recording.take()) == ["layer"] and recording.take() == {}


def test_records_are_added_layer_by_layer():
    a, b = {"x": records([1]), "y": records([2])}, {"y": records([3]), "z": records([4])}
    total = add_records(a, b)
    assert {name: int(record.tokens_per_slot) for name, record in total.items()} == {"x": 1, "y": 5, "z": 4}
    assert int(a["y"].tokens_per_slot) == 2
