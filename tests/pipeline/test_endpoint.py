"""The client: what is found out before any work, faults of servers, and that nothing is paid twice."""

import logging
import pickle
import sys
import threading

import pytest

from openrlhf.pipeline.endpoint import BadReply, Endpoint, EndpointError, RequestFailed
from openrlhf.pipeline.prompts import Pairs, Uncovered, Verdicts, ask_check, ask_pairs, verdicts
from openrlhf.pipeline.replies import Meter, estimate_tokens, parse, price, schema_of
from openrlhf.pipeline.state import State
from tests.pipeline.endpoint_server import KEY, MODEL, MODES, EndpointServer

PASSAGE = ("Saturn", "Saturn is the sixth planet. Its density is 0.69 grams. Galileo saw its rings in 1610.")
MESSAGES = ask_pairs([PASSAGE], "simple_qa", "en", 4)


@pytest.fixture
def state(tmp_path):
    with State(tmp_path / "state.sqlite") as state:
        yield state


@pytest.fixture
def connect(monkeypatch):
    """An endpoint for a server, without pauses between tries."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.02)
    monkeypatch.setattr("openrlhf.pipeline.endpoint.BODY_PAUSE", 0.01)

    def make(server: EndpointServer, key: str = KEY, **options) -> Endpoint:
        monkeypatch.setenv("BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", key)
        return Endpoint(**{"model": MODEL, "retries": 2, "timeout": 20.0, **options})

    return make


def test_a_good_server_needs_one_probe_and_strict_schemas(connect, state):
    with EndpointServer() as server:
        endpoint, meter = connect(server), Meter()
        endpoint.probe()
        assert len(server.requests) == 1 and endpoint.mode == "json_schema"
        pairs = endpoint.ask(state, MESSAGES, Pairs, meter).pairs
        assert {pair.answer for pair in pairs} == {"1610", "sixth"} or pairs
        sent = server.requests[1]
        assert sent["temperature"] == 0 and sent["seed"] == 42 and sent["max_tokens"] == endpoint.max_tokens
        schema = sent["response_format"]["json_schema"]["schema"]
        assert schema["additionalProperties"] is False and "$ref" not in str(schema)
        assert meter.all.requests == 1 and meter.all.prompt > 50 and not meter.all.estimated


@pytest.mark.parametrize("refusal", [400, 500])
@pytest.mark.parametrize("mode", MODES[1:])
def test_the_probe_falls_back_to_the_strictest_way_that_works(connect, state, mode, refusal):
    with EndpointServer(mode=mode, refusal=refusal) as server:
        endpoint = connect(server)
        endpoint.probe()
        assert endpoint.mode == mode and len(server.requests) == MODES.index(mode) + 1
        assert endpoint.ask(state, MESSAGES, Pairs, Meter()).pairs
        assert len(server.requests) == MODES.index(mode) + 2  # remembered


def test_the_way_of_asking_for_json_is_no_part_of_the_key(connect, state):
    with EndpointServer() as server:
        connect(server).ask(state, MESSAGES, Pairs, Meter())
    with EndpointServer(mode="text") as other:
        endpoint = connect(other)
        endpoint.probe()
        before = len(other.requests)
        endpoint.ask(state, MESSAGES, Pairs, Meter())
        assert len(other.requests) == before


def test_options_that_a_model_refuses_are_renamed_or_left_out(connect, state, caplog):
    with EndpointServer(refuses=("max_tokens", "temperature", "seed")) as server:
        endpoint = connect(server)
        endpoint.probe()
        endpoint.ask(state, MESSAGES, Pairs, Meter())
        sent = server.requests[-1]
        assert sent["max_completion_tokens"] == endpoint.max_tokens
        assert not {"max_tokens", "temperature", "seed"} & set(sent)
        assert "temperature" in caplog.text and endpoint.mode == "json_schema"


def test_further_fields_go_with_each_request_and_into_the_key(connect, state):
    with EndpointServer() as server:
        plain, thoughtless = connect(server), connect(server, extra={"enable_thinking": False})
        thoughtless.probe()
        for endpoint in (plain, thoughtless, thoughtless):
            endpoint.ask(state, MESSAGES, Pairs, Meter())
        assert [request.get("enable_thinking") for request in server.requests] == [False, None, False]


def test_a_wrong_key_is_one_clear_sentence(connect):
    with EndpointServer() as server:
        with pytest.raises(EndpointError, match="does not accept the key in OPENAI_API_KEY") as error:
            connect(server, key="sk-secret-of-another-provider").probe()
        assert "secret" not in str(error.value) and len(server.requests) == 1


def test_an_unknown_model_is_told_with_those_that_are_offered(connect):
    with (
        EndpointServer() as server,
        pytest.raises(EndpointError, match=f"the model gpt-9 is not known at {server.url}, which offers: {MODEL}"),
    ):
        connect(server, model="gpt-9").probe()


def test_a_wrong_path_is_told(connect, monkeypatch):
    with EndpointServer() as server:
        endpoint = connect(server)
        monkeypatch.setenv("BASE_URL", server.url.removesuffix("/v1"))
        with pytest.raises(EndpointError, match="usually ends in /v1"):
            Endpoint(endpoint.model).probe()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("403", "does not let this key use the model"),
        ("402", "no credit left"),
        ("quota", "no credit left"),
        ("arrears", "no credit left"),
    ],
)
def test_what_an_account_may_not_is_told_before_any_work(connect, fault, said):
    with EndpointServer(faults=lambda number, _: fault) as server, pytest.raises(EndpointError, match=said):
        connect(server).probe()


def test_a_server_that_is_not_there_is_told(connect):
    with EndpointServer() as server:
        endpoint = connect(server)
    with pytest.raises(EndpointError, match="cannot be used: the connection fails"):
        endpoint.probe()


@pytest.mark.parametrize("fault", ["429", "500", "503", "drop", "html", "no_choices", "cut_body"])
def test_a_passing_fault_is_tried_again(connect, state, fault):
    with EndpointServer(faults={0: fault}) as server:
        meter = Meter()
        assert connect(server).ask(state, MESSAGES, Pairs, meter).pairs
        assert len(server.requests) == 2 and meter.new.requests == 1


def test_retry_after_is_waited_for(connect, state, monkeypatch):
    waits = []
    monkeypatch.setattr("openai._base_client.SyncAPIClient._sleep_for_retry", _noted(waits))
    with EndpointServer(faults={0: "429"}) as server:
        assert connect(server).ask(state, MESSAGES, Pairs, Meter()).pairs
    assert waits == [1.0]


def _noted(waits):
    def sleep(self, *, retries_taken, max_retries, options, response):
        headers = response.headers if response is not None else None
        waits.append(self._calculate_retry_timeout(max_retries - retries_taken, options, headers))

    return sleep


def test_a_slow_server_times_out_and_is_tried_again(connect, state):
    with EndpointServer(faults={0: "slow"}) as server:
        assert connect(server, timeout=5.0).ask(state, MESSAGES, Pairs, Meter()).pairs
        assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("500", "HTTP 500 3 times"),
        ("429", "asks to wait 1 s"),
        ("drop", "the connection fails"),
        ("html", "it is a web page; BASE_URL usually ends in /v1"),
        ("no_choices", "it holds no choices"),
        ("cut_body", "not one of a chat endpoint"),
    ],
)
def test_a_lasting_fault_fails_the_request_and_is_not_kept(connect, state, fault, said):
    with EndpointServer(faults=lambda number, _: fault) as server:
        endpoint = connect(server)
        with pytest.raises(RequestFailed, match=said) as error:
            endpoint.ask(state, MESSAGES, Pairs, Meter())
        assert not error.value.refused
        server.faults = {}
        assert endpoint.ask(state, MESSAGES, Pairs, Meter()).pairs


@pytest.mark.parametrize("fault", ["cut_json", "prose"])
def test_a_reply_in_another_shape_is_asked_for_again_with_the_reason(connect, state, fault):
    with EndpointServer(faults={0: fault}) as server:
        meter = Meter()
        assert connect(server).ask(state, MESSAGES, Pairs, meter).pairs
        again = server.requests[1]["messages"][-1]["content"]
        assert again.startswith(MESSAGES[-1]["content"]) and "could not be used: it holds no JSON object" in again
        assert meter.all.requests == meter.new.requests == 2


def test_a_reply_that_is_cut_off_gets_twice_the_room(connect, state):
    with EndpointServer(faults={0: "length"}) as server:
        endpoint = connect(server, max_tokens=300)
        assert endpoint.ask(state, MESSAGES, Pairs, Meter()).pairs
        assert [request["max_tokens"] for request in server.requests] == [300, 600]
        assert "cut off after 300 tokens" in server.requests[1]["messages"][-1]["content"]


def test_asking_again_has_an_end(connect, state):
    with EndpointServer(faults=lambda number, _: "prose") as server:
        endpoint = connect(server)
        with pytest.raises(BadReply, match="no JSON object"):
            endpoint.ask(state, MESSAGES, Pairs, Meter())
        sent = len(server.requests)
        assert sent == 2  # a third would have the second one's words, whose reply is known
        with pytest.raises(BadReply):
            endpoint.ask(state, MESSAGES, Pairs, Meter())
        assert len(server.requests) == sent


def test_a_reply_is_paid_once_whatever_the_address(connect, state):
    with EndpointServer() as server, EndpointServer() as mirror:
        first, meter = connect(server).ask(state, MESSAGES, Pairs, Meter()), Meter()
        assert connect(mirror).ask(state, MESSAGES, Pairs, meter) == first
        assert mirror.requests == [] and meter.new.requests == 0 and meter.all.requests == 1
        connect(mirror, seed=7).ask(state, MESSAGES, Pairs, meter)
        assert len(mirror.requests) == 1


def test_threads_that_ask_the_same_send_it_once(connect, state):
    with EndpointServer(delay=0.3) as server:
        endpoint, found = connect(server), []
        threads = [
            threading.Thread(target=lambda: found.append(endpoint.ask(state, MESSAGES, Pairs, Meter())))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(found) == 4 and len(server.requests) == 1


def other(number: int):
    return ask_pairs([PASSAGE], "simple_qa", "en", number + 1)


def test_too_many_failures_in_a_row_stop_all_work(connect, state):
    with EndpointServer(faults=lambda number, _: "500") as server:
        endpoint = connect(server, give_up_after=3, retries=0)
        for number in range(2):
            with pytest.raises(RequestFailed):
                endpoint.ask(state, other(number), Pairs, Meter())
        with pytest.raises(EndpointError, match="3 requests in a row failed .* give the same command again"):
            endpoint.ask(state, other(2), Pairs, Meter())
        with pytest.raises(EndpointError):
            endpoint.ask(state, other(3), Pairs, Meter())
        assert len(server.requests) == 3


def test_texts_that_a_providers_filter_refuses_do_not_stop_the_work(connect, state):
    with EndpointServer(faults=lambda number, _: "filter") as server:
        endpoint = connect(server, give_up_after=3)
        for number in range(5):
            with pytest.raises(RequestFailed, match="inappropriate") as error:
                endpoint.ask(state, other(number), Pairs, Meter())
            assert error.value.refused
        assert len(server.requests) == 5


def test_failures_with_successes_between_do_not_stop_the_work(connect, state):
    with EndpointServer(faults=lambda number, _: "500" if number % 2 else None) as server:
        endpoint = connect(server, give_up_after=2, retries=0)
        for number in range(0, 6, 2):
            assert endpoint.ask(state, other(number), Pairs, Meter()).pairs
            with pytest.raises(RequestFailed):
                endpoint.ask(state, other(number + 1), Pairs, Meter())


def test_a_key_that_ends_in_mid_work_stops_it_at_once(connect, state):
    with EndpointServer() as server:
        endpoint = connect(server)
        endpoint.ask(state, other(0), Pairs, Meter())
        server.key = "renewed"
        for _ in range(2):
            with pytest.raises(EndpointError, match="does not accept the key"):
                endpoint.ask(state, other(1), Pairs, Meter())
        assert len(server.requests) == 2


def test_a_refusal_is_told_apart_and_not_tried_again(connect, state):
    with EndpointServer(faults={0: "400"}) as server:
        with pytest.raises(RequestFailed, match="the server refuses the request .HTTP 400.: .*fault") as error:
            connect(server).ask(state, MESSAGES, Pairs, Meter())
        assert error.value.refused and len(server.requests) == 1


def test_the_key_is_nowhere_but_in_the_header(connect, state, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    secret = "sk-very-secret-0123456789"
    with EndpointServer(key=secret, faults=lambda number, _: "500" if number else None) as server:
        endpoint = connect(server, key=f"{secret}\n", retries=0)
        endpoint.ask(state, other(0), Pairs, Meter())
        with pytest.raises(RequestFailed) as error:  # the server's message repeats the key
            endpoint.ask(state, other(1), Pairs, Meter())
        assert server.keys == {secret}
    told = [str(error.value), repr(endpoint), caplog.text, repr(pickle.dumps(endpoint))]
    told += [path.read_bytes().decode("latin-1") for path in tmp_path.iterdir()]
    assert "***" in told[0] and not any(secret in text for text in told)


@pytest.mark.parametrize("key", ["sk-a b", "sk-a\nb", "sk-ключ"])
def test_a_key_that_no_header_can_hold_is_refused_without_showing_it(connect, key):
    with EndpointServer() as server, pytest.raises(EndpointError, match="copy it again") as error:
        connect(server, key=key).probe()
    assert key not in str(error.value)


def test_a_missing_key_and_a_wrong_address_are_told(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("BASE_URL", raising=False)
    with pytest.raises(EndpointError, match="OPENAI_API_KEY is not set"):
        Endpoint("m").probe()
    monkeypatch.setenv("BASE_URL", "localhost:8000")
    with pytest.raises(EndpointError, match="BASE_URL must be an address"):
        Endpoint("m")


def test_a_missing_package_is_told(connect, monkeypatch):
    with EndpointServer() as server:
        endpoint = connect(server)
        monkeypatch.setitem(sys.modules, "openai", None)
        with pytest.raises(EndpointError, match=r"openai is missing: pip install 'clara-rag\[pipeline\]'"):
            endpoint.probe()


def test_a_password_in_the_address_is_not_shown(monkeypatch):
    monkeypatch.setenv("BASE_URL", "http://me:hidden@127.0.0.1:9/v1?token=hidden")
    assert Endpoint("m").place == "http://127.0.0.1:9/v1"


def test_an_endpoint_can_be_pickled_in_the_middle_of_its_work(connect, state):
    with EndpointServer(mode="json_object") as server:
        endpoint = connect(server)
        endpoint.probe()
        copy = pickle.loads(pickle.dumps(endpoint))
        assert copy.mode == "json_object" and copy.ask(state, MESSAGES, Pairs, Meter()).pairs


def test_tokens_are_estimated_where_a_server_does_not_count_them(connect, state):
    with EndpointServer(faults=lambda number, _: "no_usage") as server:
        meter = Meter()
        connect(server).ask(state, MESSAGES, Pairs, meter)
        assert meter.all.estimated and meter.all.prompt > 100 and meter.all.completion > 5
    assert estimate_tokens("four letters are one token") == 7 and estimate_tokens("三个字两个词") == 5


def test_prices_come_from_the_environment(monkeypatch):
    monkeypatch.delenv("PRICE_PER_M_INPUT", raising=False)
    monkeypatch.delenv("PRICE_PER_M_OUTPUT", raising=False)
    assert price() is None and Meter().all.cost() is None
    monkeypatch.setenv("PRICE_PER_M_INPUT", "0.5")
    monkeypatch.setenv("PRICE_PER_M_OUTPUT", "2")
    meter = Meter()
    meter.all.add({"prompt": 2_000_000, "completion": 500_000, "estimated": False})
    assert meter.all.cost() == 2.0
    monkeypatch.setenv("PRICE_PER_M_OUTPUT", "two")
    with pytest.raises(ValueError, match="PRICE_PER_M_INPUT and PRICE_PER_M_OUTPUT must be prices"):
        price()


GOOD = '{"facts": ["a, }", "b"]}'


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"```json\n{GOOD}\n```",
        f"Sure! Here it is: {GOOD} I hope {{that}} helps.",
        '{"facts": ["a, }", "b",],}',
        f'<think>maybe {{"facts": ["no"]}}?</think>\n{GOOD}',
        '["a, }", "b"]',
        '{"facts": ["a, }", "b"], "note": "none"}',
        '{"thought": 1} ' + GOOD,
    ],
)
def test_the_object_is_found_in_a_reply(text):
    assert parse(text, Uncovered).facts == ["a, }", "b"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no JSON object"),
        ('{"facts": ["a", "b', "no JSON object"),
        ('{"facts": "a"}', "facts: Input should be a valid list"),
        ('{"facts": [1]}', "facts.0: Input should be a valid string"),
        ('{"other": []}', "facts: Field required"),
        ('{"facts": ["\\ud83d"]}', "facts.0: |holds a character"),
        ('<think>{"facts": []}', "no JSON object"),
        ("[" * 100_000, "no JSON object"),
    ],
)
def test_what_is_no_such_object_is_refused_with_the_reason(text, said):
    with pytest.raises(ValueError, match=said):
        parse(text, Uncovered)


def test_a_cut_off_list_is_not_taken_for_its_whole_items():
    with pytest.raises(ValueError):
        parse('{"verdicts": [{"number": 1, "reason": "", "supported": true}, {"number": 2, "rea', Verdicts)


def test_schemas_are_strict_at_every_depth():
    inner = schema_of(Verdicts)["properties"]["verdicts"]["items"]
    assert inner["additionalProperties"] is False and inner["required"] == ["number", "reason", "supported"]


@pytest.mark.parametrize("fault", [None, "fewer"])
def test_the_check_is_asked_about_every_item(connect, state, fault):
    items = [{"question": "When?", "answer": "1610"}, {"question": "When?", "answer": "1999"}]
    with EndpointServer(faults={0: fault} if fault else None) as server:
        reply = connect(server).ask(state, ask_check([PASSAGE], items), verdicts(2), Meter())
        assert server.requests[0]["response_format"]["json_schema"]["schema"]["properties"]["verdicts"]["minItems"] == 2
        assert len(server.requests) == (2 if fault else 1)
    assert [(verdict.number, verdict.supported) for verdict in reply.verdicts] == [(1, True), (2, False)]


def test_an_object_that_a_check_of_the_caller_refuses_is_asked_for_again(connect, state):
    with EndpointServer() as server, pytest.raises(BadReply, match="too dull"):
        try:
            connect(server).ask(state, MESSAGES, Pairs, Meter(), lambda pairs: "too dull")
        finally:
            assert "could not be used: too dull" in server.requests[1]["messages"][-1]["content"]
