from setuptools import setup


setup(
    # The library, the pipelines and the training scripts are folders of the checkout's root; installed, the last two
    # lie inside the library, so that nothing else lands at the top level of site-packages.
    packages=["freqgate_dit", "freqgate_dit.pipelines", "freqgate_dit.training", "freqgate_dit.training.report"],
    package_dir={
        "freqgate_dit": "freqgate_dit",
        "freqgate_dit.pipelines": "pipelines",
        "freqgate_dit.training": "training",
    },
    package_data={"freqgate_dit": ["model_card_template.md"], "freqgate_dit.training": ["configs/*.yaml"]},
)
