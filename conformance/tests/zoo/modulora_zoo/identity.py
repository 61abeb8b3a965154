"""Broken in their metadata: level 0 finds them."""

from pydantic import BaseModel, ConfigDict, Field, field_serializer

from modulora_zoo.healthy import Healthy, _Options


class FutureProtocol(Healthy):
    breaks = "test_the_protocol_is_supported"


class Unlisted(Healthy):
    """No hook lists it."""

    breaks = "test_the_spec_is_registered_by_an_entry_point"


class HeavyMetadata(Healthy):
    """The module of its entry point imports torch."""

    breaks = "test_metadata_is_known_without_torch"


class SlowMetadata(Healthy):
    """The module of its entry point computes for more than half a second."""

    breaks = "test_metadata_is_imported_fast"


class UndescribedOption(Healthy):
    breaks = "test_options_are_described_and_frozen"

    class Options(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")

        group_size: int = 32


class ThawedOptions(Healthy):
    breaks = "test_options_are_described_and_frozen"

    class Options(BaseModel):
        model_config = ConfigDict(extra="forbid")

        group_size: int = Field(32, ge=2, description="weights that share a scale")


class LaxOptions(Healthy):
    """A misspelt option is ignored."""

    breaks = "test_unknown_and_malformed_options_are_refused"

    class Options(_Options):
        model_config = ConfigDict(frozen=True, extra="ignore")


class ForgetfulOptions(Healthy):
    """It records another value than it was given."""

    breaks = "test_a_checkpoint_records_the_options"

    class Options(_Options):
        @field_serializer("group_size")
        def halved(self, value):
            return value // 2


class UnkeptPromise(Healthy):
    """Its spec has a promise for an unknown option."""

    breaks = "test_promised_options_are_accepted"


class AnyShape(Healthy):
    """It accepts odd in_features, and fails later."""

    breaks = "test_shapes_follow_the_declared_multiples"

    def check_shape(self, shape):
        return


class WordsStayWords(Healthy):
    """The command line's group_size=32 is a string to it."""

    breaks = "test_promised_options_are_read_as_words"

    class Options(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")

        group_size: int | str = Field(32, description="weights that share a scale, or row")
