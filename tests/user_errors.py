"""Errors of the user, as tests expect them: two lines, one of cause and one of cure."""

import pytest

from falcon_finetune.options import UserError


def error_of(call, *arguments, **keywords) -> UserError:
    """The UserError that a call raises."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **keywords)
    assert "\n" not in caught.value.cause and "\n" not in caught.value.cure
    return caught.value
