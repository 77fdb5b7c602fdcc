"""When a node asks again, gives up, or ends for good."""

import ssl

import httpx
import pytest

from fedhead.client.joining import retry
from fedhead.client.joining.retry import Retry, judge


class RunOver(BaseException):
    pass


def status(code, path="/v1/fleet/pull-messages", **content):
    request = httpx.Request("POST", f"https://localhost:1{path}")
    return httpx.HTTPStatusError("", request=request, response=httpx.Response(code, request=request, **content))


def broken_tls(cause, text=""):
    """As httpx raises what the ssl module raised."""
    error = httpx.ConnectError(text)
    inner = OSError("from below")
    inner.__cause__ = cause
    error.__cause__ = inner
    return error


def bad_certificate(code):
    cause = ssl.SSLCertVerificationError(1, "certificate verify failed")
    cause.verify_code = code
    return broken_tls(cause, "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed")


EOF = broken_tls(ssl.SSLEOFError(8, "EOF occurred in violation of protocol"), "[SSL: UNEXPECTED_EOF] TLS certificate")
CASES = [
    (EOF, "again", retry.NO_ANSWER),
    (httpx.ConnectError("refused"), "again", retry.NO_ANSWER),
    (httpx.ReadTimeout("late"), "again", retry.NO_ANSWER),
    (httpx.WriteTimeout("late"), "again", retry.NO_ANSWER),
    (httpx.PoolTimeout("late"), "again", retry.NO_ANSWER),
    (httpx.RemoteProtocolError("cut"), "again", retry.NO_ANSWER),
    *[(status(code), "busy", retry.BUSY) for code in (408, 425, 429, 500, 501, 502, 503, 504, 599)],
    *[(status(code, "/v1/fleet/activate-node"), "busy", retry.BUSY) for code in (429, 500, 503)],
    (status(403), "over", ""),
    (status(403, "/v1/fleet/push-messages"), "over", ""),
    (status(403, "/v1/fleet/get-run"), "over", ""),
    (status(403, "/v1/fleet/pull-object"), "failed", ""),
    (status(403, "/v1/fleet/confirm-message-received"), "failed", ""),
    *[(status(code), "failed", "") for code in (301, 307, 400, 401, 404, 412, 413)],
    (status(401, "/v1/fleet/activate-node"), "fatal", retry.UNKNOWN_KEY),
    (status(401, "/v1/fleet/activate-node", json={"detail": "clock"}), "fatal", retry.WRONG_CLOCK),
    (status(401, "/v1/fleet/activate-node", json=["clock"]), "fatal", retry.UNKNOWN_KEY),
    (status(412, "/v1/fleet/activate-node"), "fatal", retry.UNKNOWN_KEY),
    *[(status(code, "/v1/fleet/activate-node"), "fatal", retry.NO_SERVER) for code in (307, 400, 403, 404, 405)],
    (bad_certificate(10), "fatal", retry.EXPIRED),
    (bad_certificate(9), "fatal", retry.EARLY),
    (bad_certificate(62), "fatal", retry.OTHER_HOST),
    (bad_certificate(64), "fatal", retry.OTHER_HOST),
    (bad_certificate(20), "fatal", retry.OTHER_CA),
    (bad_certificate(18), "fatal", retry.OTHER_CA),
    (ValueError("no protobuf"), "failed", ""),
]


@pytest.mark.parametrize(("error", "verdict", "why"), CASES)
def test_each_error_has_its_verdict(error, verdict, why):
    assert judge(error) == (verdict, why)


def test_each_fatal_reason_has_a_remedy():
    fatal = {why for error, verdict, why in CASES if verdict == "fatal"}
    assert fatal == set(retry.REMEDIES)


class Bench:
    """A `Retry` whose time passes only while it waits."""

    def __init__(self, patience=600.0):
        self.now, self.waits, self.told, self.fatal = 0.0, [], [], []
        self.retry = Retry(
            self.told.append, self.fatal.append, RunOver, patience=patience, sleep=self.sleep, clock=lambda: self.now
        )

    def sleep(self, seconds):
        self.waits.append(seconds)
        self.now += seconds

    def run(self, *outcomes):
        left = list(outcomes)

        def target(value):
            one = left.pop(0)
            if isinstance(one, BaseException):
                raise one
            return value, one

        return self.retry.invoke(target, "asked")


def test_a_request_is_tried_until_it_works_and_each_change_is_told_once():
    bench = Bench()
    assert bench.run(EOF, httpx.ConnectError(""), status(503), "done") == ("asked", "done")
    assert bench.run("again") == ("asked", "again")
    assert bench.told == [retry.NO_ANSWER, retry.BUSY, None]
    assert len(bench.waits) == 3


def test_no_answer_is_waited_for_without_end_and_waits_stay_short():
    bench = Bench()
    assert bench.run(*[httpx.ConnectError("")] * 2000, "done") == ("asked", "done")
    assert bench.now > 2000
    assert max(bench.waits) <= retry.LONGEST_WAIT
    assert min(bench.waits) > 0


def test_a_server_that_answers_with_errors_is_given_up_after_the_patience():
    bench = Bench(patience=60.0)
    with pytest.raises(httpx.HTTPStatusError):
        bench.run(*[status(500)] * 2000)
    assert 60 <= bench.now <= 60 + retry.LONGEST_WAIT
    assert bench.fatal == []


@pytest.mark.parametrize("error", [status(412), status(403, "/v1/fleet/pull-object")])
def test_what_is_no_use_is_not_tried_again(error):
    bench = Bench()
    with pytest.raises(httpx.HTTPStatusError):
        bench.run(error, "never")
    assert (bench.waits, bench.fatal) == ([], [])


def test_a_run_that_is_over_is_told_to_the_loop():
    bench = Bench()
    with pytest.raises(RunOver):
        bench.run(status(403), "never")
    assert bench.told == [None]  # it answered


def test_a_fatal_reason_is_said_before_the_error_is_raised():
    bench = Bench()
    with pytest.raises(httpx.ConnectError):
        bench.run(bad_certificate(10), "never")
    assert bench.fatal == [retry.EXPIRED]
    assert bench.waits == []


def test_other_errors_pass_through():
    bench = Bench()
    with pytest.raises(ValueError, match="no protobuf"):
        bench.run(ValueError("no protobuf"), "never")
    assert bench.waits == []
