"""The flags that comparisons share."""

import pytest

from graphmoe.errors import ConfigError
from recipes.balance_study import BalanceConfig
from recipes.classification_config import ClassifierConfig
from recipes.compare_phases import CompareConfig
from recipes.expert_choice_classify import ExpertChoiceClassifyConfig
from recipes.language_model_config import LanguageModelConfig
from recipes.moc_ablate import AblateConfig
from recipes.moc_lm import MocConfig
from recipes.set_config import SetConfig
from recipes.set_study import SetStudyConfig
from recipes.study_flags import StudyFlags

STUDIES = {
    BalanceConfig: LanguageModelConfig,
    CompareConfig: LanguageModelConfig,
    AblateConfig: MocConfig,
    ExpertChoiceClassifyConfig: ClassifierConfig,
    SetStudyConfig: SetConfig,
}


@pytest.mark.parametrize("kind", STUDIES)
def test_defaults_are_those_of_the_models_but_for_what_a_study_says(kind):
    study, model = kind(), STUDIES[kind]()
    said = {name for base in (kind, StudyFlags) for name in base.__annotations__}
    assert {"num_seeds", "learning_rates"} <= said
    for name, value in vars(model).items():
        assert name in said or getattr(study, name) == value, name
    assert study.num_seeds == 3 and kind().learning_rates is not study.learning_rates


@pytest.mark.parametrize("kind", STUDIES)
def test_a_rate_that_no_arm_would_have(kind):
    kind(learning_rate=0.5, learning_rates=[0.5, 0.1])
    with pytest.raises(ConfigError, match=r"--learning_rate: .*expected --learning_rates, from which"):
        kind(learning_rate=0.5)


@pytest.mark.parametrize("kind", STUDIES)
@pytest.mark.parametrize(
    "wrong", [{"num_seeds": 0}, *({"learning_rates": rates} for rates in ([], [1e-3, 1e-3], [1e-3, 0.0]))]
)
def test_wrong_seeds_and_rates(kind, wrong):
    with pytest.raises(ConfigError, match=f"--{next(iter(wrong))}: value cannot be used; expected"):
        kind(**wrong)


@pytest.mark.parametrize("kind", STUDIES)
def test_wrong_arms_and_what_models_refuse(kind):
    name = "phases" if kind is CompareConfig else "arms"
    known = getattr(kind(), name) or ["moc", "moe"]
    assert getattr(kind(**{name: list(known[:2])}), name) == known[:2]
    for wrong in ([], [known[0], known[0]], [known[0], "nonsense"]):
        with pytest.raises(ConfigError, match=f"--{name}: value cannot be used; expected .* of .*{known[1]}"):
            kind(**{name: wrong})
    with pytest.raises(ConfigError, match="--max_steps"):
        kind(max_steps=0)
