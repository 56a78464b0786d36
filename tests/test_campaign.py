"""Random models: whatever the model, the guide attaches, is scored right, trains, answers, and is saved.

Which models these are is settled by a seed. CAMPAIGN_MODELS and CAMPAIGN_SEED ask for more, or others:
CAMPAIGN_MODELS=3000 pytest -m slow tests/test_campaign.py
"""

import os

import pytest
from hypothesis import HealthCheck, Phase, given, note, seed, settings

from tests.campaign import Description, check, descriptions

MANY = int(os.environ.get("CAMPAIGN_MODELS", "500"))
SEED = int(os.environ.get("CAMPAIGN_SEED", "0"))
FEW = 12


def campaign(models):
    """A test of so many models; what fails is shrunk to the smallest model that fails."""
    options = settings(
        max_examples=models,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    return lambda test: seed(SEED)(options(given(descriptions())(test)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("campaign")


@pytest.mark.filterwarnings("ignore")  # Pyro's, about models that draw what the guide does not know of
@campaign(FEW)
def test_a_few_models(folder, description):
    note(str(description))
    check(description, folder)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@campaign(MANY)
def test_many_models(folder, description):
    note(str(description))
    check(description, folder)


def test_descriptions_are_of_every_kind():
    """Among 150 of them, every support, family, layout, way of subsampling and mask occurs."""
    found: list[Description] = []

    @campaign(150)
    def collect(description):
        found.append(description)

    collect()
    kinds = {latent.kind for d in found for latent in d.latents}
    assert len(kinds) >= 20
    assert {plate.take for d in found for plate in d.plates} == {"all", "batch", "own", "chosen", "unsized"}
    assert {seen.mask for d in found for seen in d.seen} == {"", "mask", "obs_mask"}
    assert {len(d.plates) for d in found} == {0, 1, 2}
    assert any(d.ragged for d in found)
    assert any(latent.parents for d in found for latent in d.latents)
    assert any(latent.masked for d in found for latent in d.latents)
