"""The cut, over every family: the same features as uncut, and gradients of one record that Opacus gets right."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision
import transformers
from opacus import GradSampleModule
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

from fedhead.client.paths import make_path
from fedhead.common.config.schema import ModelSettings, TaskSettings
from fedhead.common.errors import ModelError
from fedhead.common.features import FeatureSet
from fedhead.common.models import encoders, modules, vision
from fedhead.common.models.backbones import Backbone, assemble
from fedhead.common.models.cut import LeafAttention
from fedhead.common.models.images import ImagePipeline, VectorPipeline
from fedhead.common.models.network import Network
from fedhead.common.models.pipelines import TextPipeline
from fedhead.common.models.trainable import Trainable, unsupported_leaves
from fedhead.common.tasks import make_task

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "the", "was", "very"]
TINY = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
TEXTS = ["the film was very very good", "bad", "the film was bad", ""]


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")


def text(config: transformers.PreTrainedConfig, pooling: str = "mean") -> Callable[[], Network]:
    def build() -> Network:
        model = transformers.AutoModel.from_config(config).eval()
        return encoders.as_network(model, "transformers:tiny", pooling, TextPipeline.of(tokenizer(), 32, model))

    return build


def image(build_model: Callable[[], nn.Module], size: int) -> Callable[[], Network]:
    def build() -> Network:
        model = build_model()
        vision.remove_classifier(model)
        return vision.as_network(model, "torchvision:small", ImagePipeline((size,), (size, size)))

    return build


def hub_vit(kind: type, pooling: str) -> Callable[[], Network]:
    def build() -> Network:
        model = transformers.AutoModel.from_config(kind(image_size=32, patch_size=8, pooler_output_size=16, **TINY))
        return encoders.as_network(model, "transformers:vit", pooling, ImagePipeline((32,), (32, 32)))

    return build


def own() -> Network:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 5), nn.Tanh())
    return modules.as_network(net, "module:a.b:c", "vector", VectorPipeline(6))


def small_vit() -> nn.Module:
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=4, hidden_dim=16, mlp_dim=32, dropout=0.1
    )
    nn.init.normal_(model.class_token)
    return model


def normed(model: nn.Module) -> nn.Module:
    """BatchNorm statistics as after training, so that a batch's own statistics would be noticed."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -0.5, 0.5)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
    return model


BERT = dict(vocab_size=len(WORDS), max_position_embeddings=34, pad_token_id=0, **TINY)
FAMILIES: dict[str, Callable[[], Network]] = {
    "resnet18": image(lambda: normed(torchvision.models.resnet18()), 64),
    "bottleneck": image(lambda: normed(slim_resnet50()), 64),
    "vgg11": image(lambda: slim_vgg(False), 32),
    "vgg11_bn": image(lambda: normed(slim_vgg(True)), 32),
    "vit_b": image(small_vit, 32),
    "bert": text(transformers.BertConfig(**BERT)),
    "bert-pooler": text(transformers.BertConfig(**BERT), "pooler"),
    "bert-cls": text(transformers.BertConfig(**BERT), "cls"),
    "roberta": text(transformers.RobertaConfig(**BERT)),
    "electra": text(transformers.ElectraConfig(embedding_size=12, **BERT)),
    "mpnet": text(transformers.MPNetConfig(**BERT)),
    "distilbert": text(
        transformers.DistilBertConfig(
            vocab_size=len(WORDS), dim=16, n_layers=3, n_heads=2, hidden_dim=32, max_position_embeddings=34
        )
    ),
    "vit": hub_vit(transformers.ViTConfig, "mean"),
    "vit-cls": hub_vit(transformers.ViTConfig, "cls"),
    "vit-pooler": hub_vit(transformers.ViTConfig, "pooler"),
    "deit": hub_vit(transformers.DeiTConfig, "mean"),
    "sequential": own,
}
UNCUTTABLE: dict[str, Callable[[], Network]] = {
    "deberta-v2": text(transformers.DebertaV2Config(relative_attention=True, pos_att_type=["c2p", "p2c"], **BERT)),
    "mobilenet": image(torchvision.models.mobilenet_v3_small, 64),
}


def slim_vgg(norm: bool) -> nn.Module:
    """VGG's own class with few channels: its real classifier alone would be 400 MB."""
    with torch.device("meta"):
        model = torchvision.models.VGG(nn.Sequential(), init_weights=False)
    model.features = torchvision.models.vgg.make_layers([8, "M", 8, "M", 16, 16, "M"], batch_norm=norm)
    model.avgpool = nn.AdaptiveAvgPool2d(2)
    model.classifier = nn.Sequential(
        nn.Linear(64, 24), nn.ReLU(True), nn.Dropout(), nn.Linear(24, 24), nn.ReLU(True), nn.Dropout(), nn.Linear(24, 9)
    )
    return model


def slim_resnet50() -> nn.Module:
    """The kind of block that resnet50 has, one a stage and narrow inside."""
    return torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], width_per_group=8)


def make(name: str, unfreeze: int) -> Backbone:
    """The same weights for every cut."""
    torch.manual_seed(1)
    network = {**FAMILIES, **UNCUTTABLE}[name]()
    return assemble(network, ModelSettings(backbone=network.architecture, unfreeze=unfreeze))


def inputs(backbone: Backbone) -> list:
    if backbone.kind == "text":
        return TEXTS
    random = np.random.default_rng(0)
    if backbone.kind == "vector":
        return list(random.normal(size=(4, 6)))
    return list(random.integers(0, 256, (4, 40, 48, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", FAMILIES)
def test_cut_gives_the_features_of_the_uncut_network(name):
    whole = make(name, 0)
    expected, lengths = whole.forward(whole.collate(inputs(whole)))
    assert whole.tail is None
    assert lengths is None
    assert expected.shape == (4, whole.dim)
    assert expected.std() > 1e-3  # features that are all alike would hide a wrong cut
    for unfreeze in (1, 2):
        cut = make(name, unfreeze)
        values, lengths = cut.forward(cut.collate(inputs(cut)))
        torch.testing.assert_close(cut.tail(values, lengths), expected, atol=1e-5, rtol=1e-5)
        assert (cut.digest, cut.dim) == (whole.digest, whole.dim)
        assert cut.preprocessing != whole.preprocessing


@pytest.mark.parametrize("name", FAMILIES | UNCUTTABLE)
def test_a_record_alone_has_the_features_it_has_in_a_batch(name):
    backbone = make(name, 0)
    together, _ = backbone.forward(backbone.collate(inputs(backbone)))
    alone = torch.cat([backbone.forward(backbone.collate([record]))[0] for record in inputs(backbone)])
    torch.testing.assert_close(alone, together, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in FAMILIES if make(name, 0).kind == "text"])
def test_text_tail_looks_at_nothing_behind_a_record(name):
    backbone = make(name, 2)
    values, lengths = backbone.forward(backbone.collate(inputs(backbone)))
    assert lengths.tolist() == [8, 3, 6, 2]
    expected = backbone.tail(values, lengths)
    for row, length in zip(values, lengths, strict=True):
        row[length:] = 1e3
    padded = torch.cat([values, torch.full((4, 5, values.shape[2]), -7.0)], dim=1)
    torch.testing.assert_close(backbone.tail(padded, lengths), expected, atol=1e-5, rtol=1e-5)
    empty = backbone.tail(padded, torch.zeros_like(lengths))
    assert torch.isfinite(empty).all()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("unfreeze", [1, 2])
def test_gradients_of_one_record_equal_those_of_a_batch_of_one(name, unfreeze):
    backbone = make(name, unfreeze)
    values, lengths = backbone.forward(backbone.collate(inputs(backbone)))
    head = nn.Linear(backbone.dim, 3)
    trainable = Trainable(backbone.tail, True, head)
    assert not unsupported_leaves(trainable)
    targets = torch.tensor([0, 1, 2, 1])

    expected: dict[str, list[torch.Tensor]] = {}
    for i in range(4):
        one = trainable(values[i : i + 1], None if lengths is None else lengths[i : i + 1])
        gradients = torch.autograd.grad(
            nn.functional.cross_entropy(one, targets[i : i + 1]), list(trainable.trained().values())
        )
        for key, gradient in zip(trainable.trained(), gradients, strict=True):
            expected.setdefault(key, []).append(gradient)

    hooked = GradSampleModule(copy.deepcopy(trainable), loss_reduction="sum")
    hooked.train()
    nn.functional.cross_entropy(hooked(values, lengths), targets, reduction="sum").backward()
    assert expected  # every trained parameter is used: autograd.grad would have failed on another
    for key, parameter in hooked._module.trained().items():
        torch.testing.assert_close(parameter.grad_sample, torch.stack(expected[key]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("unfreeze", [0, 1, 2])
def test_the_clipped_sum_equals_micro_batches_of_one_record(name, unfreeze):
    """Our own path (closed form at k = 0, ghost behind a cut) against plain autograd, record by record."""
    backbone = make(name, unfreeze)
    values, lengths = backbone.forward(backbone.collate(inputs(backbone)))
    head = nn.Linear(backbone.dim, 3)
    trainable = Trainable(backbone.tail, True, head)
    task = make_task(TaskSettings(labels=["a", "b", "c"]))
    targets = torch.tensor([0, 1, 2, 1])
    parameters = list(trainable.trained().values())

    gradients = []
    for i in range(4):
        one = trainable(values[i : i + 1], None if lengths is None else lengths[i : i + 1])
        loss = task.losses(one, targets[i : i + 1]).sum()
        gradients.append([gradient.clone() for gradient in torch.autograd.grad(loss, parameters)])
    norms = torch.stack([torch.cat([part.flatten() for part in one]).norm() for one in gradients])
    clipping_norm = float(norms.median())  # some records are clipped, some are not
    factors = (clipping_norm / norms).clamp(max=1)
    expected = [sum(f * one[k] for f, one in zip(factors, gradients, strict=True)) for k in range(len(parameters))]

    path = make_path(trainable, task)
    assert type(path).__name__ == ("ClosedForm" if unfreeze == 0 else "Ghost")
    if lengths is None:
        features = FeatureSet(values, None)
    else:
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        features = FeatureSet(torch.cat([row[:n] for row, n in zip(values, lengths, strict=True)]), offsets)
    path.begin(features, targets, clipping_norm)
    for chunk in (slice(0, 3), slice(3, 4)):
        path.add_rows(chunk)
    path.end()
    for parameter, total in zip(path.parameters, expected, strict=True):
        torch.testing.assert_close(parameter.summed_grad, total, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_only_what_is_behind_the_cut_trains(name):
    backbone = make(name, 1)
    parent = nn.ModuleList([backbone.frozen, Trainable(backbone.tail, True, nn.Linear(backbone.dim, 2))]).train()
    assert not any(parameter.requires_grad for parameter in backbone.frozen.parameters())
    assert not any(module.training for module in backbone.frozen.modules())
    for module in backbone.tail.modules():
        trains = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        assert module.training == trains
        assert not getattr(module, "inplace", False)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert not trains
    values, lengths = backbone.forward(backbone.collate(inputs(backbone)))
    assert torch.equal(parent[1](values, lengths), parent[1](values, lengths))  # no dropout, no statistics


@pytest.mark.parametrize(
    ("name", "blocks"), [("resnet18", 8), ("vgg11", 6), ("vit_b", 3), ("bert", 3), ("vit", 3), ("sequential", 4)]
)
def test_too_many_blocks(name, blocks):
    assert make(name, blocks).tail is not None
    with pytest.raises(ModelError, match=rf"^model.unfreeze is {blocks + 1}: the backbone has {blocks} blocks.*\.$"):
        make(name, blocks + 1)


@pytest.mark.parametrize("name", UNCUTTABLE)
def test_families_without_a_cut(name):
    with pytest.raises(ModelError, match=r"^model.unfreeze is 1: .*can't be cut.*Set model.unfreeze = 0") as error:
        make(name, 1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bias", [True, False])
def test_leaf_attention_equals_torch(bias):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 4, bias=bias, batch_first=True).eval()
    x = torch.randn(3, 5, 16)
    expected = attention(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(LeafAttention(attention)(x, x, x, need_weights=False)[0], expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(ModelError, match="mask"):
        LeafAttention(attention)(x, x, x, attn_mask=torch.zeros(5, 5))
    with pytest.raises(ModelError, match="batch_first"):
        LeafAttention(nn.MultiheadAttention(16, 4))


def test_own_module_whose_parts_are_not_its_forward():
    class Wrong(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(6, 6)])

        def forward(self, x):
            return self.blocks[0](x) + 1

    network = modules.as_network(Wrong(), "module:a.b:Wrong", "vector", VectorPipeline(6))
    with pytest.raises(ModelError, match="stem, blocks and top must give what its forward gives"):
        assemble(network, ModelSettings(backbone="module:a.b:Wrong", unfreeze=1))


def test_tail_with_layers_that_opacus_does_not_know():
    net = nn.Sequential(nn.Linear(6, 6), nn.PReLU(), nn.Linear(6, 4))
    network = modules.as_network(net, "module:a.b:c", "vector", VectorPipeline(6))
    with pytest.raises(ModelError, match=r"PReLU.*unfreeze fewer blocks"):
        assemble(network, ModelSettings(backbone="module:a.b:c", unfreeze=2))
