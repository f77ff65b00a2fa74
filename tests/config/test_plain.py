"""Under a plain GRPOConfig every field of ours is there and off."""

from dataclasses import fields

from trl import GRPOConfig

from grpo_plus import GRPOPlusConfig
from grpo_plus.config.plain import OFF, own_fields


def test_every_field_of_ours_can_be_off():
    assert set(OFF) == {f.name for f in fields(GRPOPlusConfig)} - {f.name for f in fields(GRPOConfig)}


def test_what_is_off_is_a_configuration_of_its_own():
    config = GRPOPlusConfig("unused", use_cpu=True, bf16=False, **OFF)
    assert {name: getattr(config, name) for name in OFF} == OFF


def test_a_plain_configuration_has_our_fields_off_and_trls_as_they_are():
    plain = GRPOConfig("unused", use_cpu=True, bf16=False)
    seen = own_fields(plain)
    assert {name: getattr(seen, name) for name in OFF} == OFF
    plain.beta = 0.25
    assert seen.beta == 0.25


def test_a_configuration_of_ours_is_itself():
    config = GRPOPlusConfig("unused", use_cpu=True, bf16=False)
    assert own_fields(config) is config
