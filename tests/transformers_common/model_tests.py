"""transformers' own tests of models, run on Andromeda's classes. `run.py` gets them and starts this file."""

import fnmatch
import functools
import inspect
import unittest
from unittest import mock

import pytest
import torch
import transformers_source
from skips import SKIPPED, reason
from transformers.models.auto import modeling_auto

from andromeda import huggingface
from andromeda.huggingface import AndromedaConfig
from andromeda.model import Sublayer

transformers_source.register()
from transformers_tests import (  # noqa: E402
    test_configuration_common,
    test_fsdp_mixin,
    test_modeling_common,
    test_tensor_parallel_mixin,
    test_training_mixin,
)

# transformers' table of classes for a task -> ours
CLASSES = {
    "MODEL_MAPPING_NAMES": huggingface.AndromedaModel,
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": huggingface.AndromedaForCausalLM,
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": huggingface.AndromedaForSequenceClassification,
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": huggingface.AndromedaForTokenClassification,
}


class AndromedaModelTester:
    """The configuration and the inputs of the tests, in the form that the mixins expect."""

    base_model_class = huggingface.AndromedaModel
    causal_lm_class = huggingface.AndromedaForCausalLM
    sequence_classification_class = huggingface.AndromedaForSequenceClassification
    token_classification_class = huggingface.AndromedaForTokenClassification
    is_training = True
    batch_size, seq_length = 5, 7
    hidden_size, num_hidden_layers, num_attention_heads, num_labels = 32, 2, 4, 3
    padding_side = "right"

    def __init__(self, **switches):
        self.switches = switches

    def get_config(self):
        return AndromedaConfig(
            vocab_size=99,
            max_position_embeddings=128,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            head_dim=8,
            alibi_num_heads=2,
            num_labels=self.num_labels,
            pad_token_id=0,
            **self.switches,
        )

    def prepare_config_and_inputs_for_common(self):
        input_ids = torch.randint(1, 99, (self.batch_size, self.seq_length))
        attention_mask = torch.tril(torch.ones_like(input_ids))
        if self.padding_side == "left":
            attention_mask = attention_mask.flip(1)
        return self.get_config(), {"input_ids": input_ids, "attention_mask": attention_mask}


class ModelTests(test_modeling_common.ModelTesterMixin):
    all_model_classes = tuple(CLASSES.values())
    test_can_init_all_missing_weights_before_2023 = True  # the test reads the year from a comment that we have not

    def setUp(self):
        for table, model_class in CLASSES.items():
            self.patch(mock.patch.dict(getattr(modeling_auto, table), andromeda=model_class.__name__))
        # The layers that checkpoint their activations; transformers' class of this name is not in this model.
        self.patch(mock.patch.object(test_modeling_common, "GradientCheckpointingLayer", Sublayer))
        # Tests with several processes, which transformers runs only for some models, with as many as there are cores.
        self.patch(mock.patch.object(test_tensor_parallel_mixin, "TP_DISTRIBUTED_TEST_MODEL_TYPES", None))
        self.patch(mock.patch.object(test_fsdp_mixin, "FSDP_DISTRIBUTED_TEST_MODEL_TYPES", None))
        self.patch(mock.patch.object(test_fsdp_mixin, "_get_available_fsdp_workers", lambda: 4))

    def patch(self, patcher):
        patcher.start()
        self.addCleanup(patcher.stop)

    def test_model_weights_reload_no_missing_tied_weights(self):
        """The test replaces all parameters in a file by another one, which our default refuses."""
        for model_class in self.all_model_classes:
            loads = functools.partial(model_class.from_pretrained, strict=False)
            self.patch(mock.patch.object(model_class, "from_pretrained", loads))
        super().test_model_weights_reload_no_missing_tied_weights()

    def test_config(self):
        sizes = {"hidden_size": 36, "head_dim": 12, "num_hidden_layers": 3, "deepnorm": False, "eos_token_id": 3}
        test_configuration_common.ConfigTester(self, AndromedaConfig, **sizes).run_common_tests()

    def test_generation_tester_mixin_inheritance(self):
        self.skipTest("the source package leaves out GenerationTesterMixin")


class AndromedaTest(
    ModelTests,
    test_training_mixin.TrainingTesterMixin,
    test_tensor_parallel_mixin.TensorParallelTesterMixin,
    test_fsdp_mixin.FSDPTesterMixin,
    unittest.TestCase,
):
    model_tester = AndromedaModelTester()


class OtherSwitchesTest(ModelTests, unittest.TestCase):
    model_tester = AndromedaModelTester(
        deepnorm=False,
        use_abs_pos_emb=True,
        rotary_xpos=False,
        alibi_pos_bias=False,
        qk_norm=False,
        shift_tokens=2,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    model_tester.padding_side = "left"


def test_exactly_the_listed_tests_are_skipped(outcomes):
    """Of those that have run, which are all unless options select some."""
    if torch.cuda.is_available():
        pytest.skip("the list is that of a machine without a GPU")
    assert {name for name, found in outcomes.items() if "skipped" in found} == {*filter(reason, outcomes)}
    patterns = [pattern for names in SKIPPED.values() for pattern in names]
    existing = [name for name, _ in inspect.getmembers(AndromedaTest) if name.startswith("test_")]
    assert [pattern for pattern in patterns if not fnmatch.filter(existing, pattern)] == []
