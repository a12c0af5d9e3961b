"""Validation of a request's JSON: defaults, and one line for every invalid value."""

import json

import pytest

from imagen_jax.serving.http_request import ClientRequestError, Limits, parse

LIMITS = Limits()


@pytest.fixture
def read(base_config, sr_config):
    return lambda body: parse(body, [base_config, sr_config], LIMITS)


def read_with(read, **values):
    return read(json.dumps({"prompt": "a cat"} | values).encode())


def test_omitted_settings_are_those_of_the_stages(read, base_config):
    request = read_with(read, prompt="  a \n cat ")
    assert (request.prompt, request.negative_prompt, request.samples) == ("a cat", "", 1)
    settings = {"steps": 4, "guidance_weight": 2.0}
    assert request.stages == {"base": settings, "sr": settings}
    assert len({read_with(read).seed for _ in range(8)}) == 8

    request = read_with(
        read, stages={"sr": {"steps": 9}}, seed=0, negative_prompt="dogs", samples=3
    )
    assert request.stages == {"base": settings, "sr": settings | {"steps": 9}}
    assert (request.seed, request.negative_prompt, request.samples) == (0, "dogs", 3)


def test_any_language_and_any_markup_is_a_prompt(read):
    for prompt in (
        "<script>alert(1)</script>",
        "../../etc/passwd",
        "ein Hund 🐕‍🦺",
        "猫",
        "%00%s{}",
    ):
        assert read_with(read, prompt=prompt).prompt == prompt


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"prompt": ""}, "prompt must be a string that is not empty"),
        ({"prompt": " \n"}, "prompt must be a string that is not empty"),
        ({"prompt": 3}, "prompt=3 must be a string"),
        ({"prompt": "a" * 1001}, "prompt has 1001 characters, expected at most 1000"),
        ({"prompt": "a\x00b"}, "prompt must not have control characters"),
        ({"prompt": "a\ud800"}, "prompt must not have control characters or lone surrogates"),
        ({"negative_prompt": ["a"]}, 'negative_prompt=["a"] must be a string'),
        ({"seed": -1}, "seed=-1 must be an integer from 0 to 4294967295"),
        ({"seed": 2**32}, "seed=4294967296 must be"),
        ({"seed": 10**400}, "seed=a huge number must be"),
        ({"seed": 1.5}, "seed=1.5 must be"),
        ({"seed": True}, "seed=true must be"),
        ({"seed": "x" * 999}, "xxx... must be an integer"),
        ({"samples": 0}, "samples=0 must be an integer from 1 to 8"),
        ({"samples": 10**9}, "samples=1000000000 must be"),
        ({"stages": []}, "stages=[] must be an object"),
        ({"stages": {"bsae": {}}}, "did you mean 'base'"),
        ({"stages": {"../../etc": {}}}, "is not one of base, sr"),
        ({"stages": {"base": 3}}, "stages.base=3 must be an object"),
        ({"stages": {"base": {"sampler": "ddim"}}}, "is not one of steps, guidance_weight"),
        ({"stages": {"base": {"steps": 10**9}}}, "stages.base.steps=1000000000 must be"),
        ({"stages": {"sr": {"steps": 0}}}, "stages.sr.steps=0 must be an integer from 1 to"),
        ({"stages": {"sr": {"guidance_weight": float("nan")}}}, "must be a number from 0 to 30"),
        ({"stages": {"sr": {"guidance_weight": float("inf")}}}, "must be a number from 0 to 30"),
        ({"stages": {"sr": {"guidance_weight": "2"}}}, "must be a number from 0 to 30"),
        ({"stages": {"sr": {"guidance_weight": 10**400}}}, "=a huge number must be a number"),
        ({"steps": 3}, "field='steps' is not one of prompt, "),
        ({"a\nb": 3}, "field='a?b' is not one of"),
    ],
)
def test_invalid_values(read, values, says):
    with pytest.raises(ClientRequestError) as error:
        read_with(read, **values)
    assert says in str(error.value) and len(str(error.value)) < 300
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"3", b"null", b"\xff\xfe{", b"[" * 16_000, b'{"seed": 1e99999}']
)
def test_bodies_that_are_no_request(read, body):
    with pytest.raises(ClientRequestError):
        read(body)
