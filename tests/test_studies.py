"""The study's settings, and what its records hold."""

import pytest

from moekit.studies import StudyConfig


def test_study_settings_are_checked():
    with pytest.raises(ValueError, match="did you mean 'mirror'"):
        StudyConfig(source="miror")
    with pytest.raises(ValueError, match="unknown preset 'foo-nano'"):
        StudyConfig(families=("foo",))
