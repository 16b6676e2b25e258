from segrpc.service.engine.base import StageTimes
from segrpc.service.telemetry.call import Call, Computation, Observer


class Notes(Observer):
    def __init__(self) -> None:
        self.seen: list[object] = []

    def began(self, call: Call) -> None:
        self.seen.append("began")

    def computed(self, call: Call, computation: Computation) -> None:
        self.seen.append(computation)

    def ended(self, call: Call) -> None:
        self.seen.append(call.status)


def test_a_call_adds_up_its_computations_and_keeps_the_longest() -> None:
    call = Call("/segrpc.v1.SegmentationService/Refine")
    call.computed("warm_up", "m", StageTimes(decode_image=1.0, encode_image=2.0), call.start)
    call.computed("round", "m", StageTimes(queue=0.5, decode_mask=3.0, embedding_cached=True), call.start)
    call.computed("round", "m", StageTimes(queue=0.25, decode_mask=4.0, postprocess=1.0), call.start)
    assert call.rounds == 2
    assert call.times == StageTimes(0.75, 1.0, 2.0, 7.0, 1.0, embedding_cached=False)
    assert call.longest == StageTimes(0.5, 1.0, 2.0, 4.0, 1.0)


def test_observers_are_told_in_order() -> None:
    first, second = Notes(), Notes()
    call = Call("/a/B", observers=(first, second))
    call.begin()
    times = StageTimes(decode_mask=1.0)
    call.computed("segment", "m", times, call.start)
    call.status = "OK"
    call.end()
    began, computation, status = first.seen
    assert (began, status) == ("began", "OK")
    assert isinstance(computation, Computation)
    assert (computation.kind, computation.model, computation.times) == ("segment", "m", times)
    assert call.seconds >= computation.seconds > 0
    assert second.seen == first.seen
