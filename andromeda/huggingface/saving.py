"""What `save_pretrained` and `push_to_hub` of this package add to those of transformers.

A saved folder opens in a process that never imported this package, with `trust_remote_code=True`: `auto_map` in
config.json names the classes, and a stub file imports them from the installed package, or says what to install. Every
file appears whole, and a save that fails leaves the folder as it was.
"""

import contextlib
import dataclasses
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from andromeda import checkpoint, files
from andromeda.config import ModelConfig
from andromeda.huggingface.model_card import add_tags, model_card

_TransportError: type[Exception] = HfHubHTTPError.__mro__[1]  # of the library for HTTP that the hub's client uses

STUB = "modeling_andromeda.py"
_CLASSES = {  # of this package, for each automatic class of transformers
    "AutoConfig": "AndromedaConfig",
    "AutoModel": "AndromedaModel",
    "AutoModelForCausalLM": "AndromedaForCausalLM",
    "AutoModelForSequenceClassification": "AndromedaForSequenceClassification",
    "AutoModelForTokenClassification": "AndromedaForTokenClassification",
}
AUTO_MAP = {automatic: f"{STUB.removesuffix('.py')}.{name}" for automatic, name in _CLASSES.items()}
_IMPORTED = ",\n        ".join(_CLASSES.values())
# Arguments of transformers' save_pretrained after the folder, in this order, and those for the hub.
_POSITIONAL = ("is_main_process", "state_dict", "push_to_hub", "max_shard_size", "variant", "token")
_HUB_OPTIONS = ("token", "repo_id", "commit_message", "commit_description", "private", "revision", "create_pr", "tags")
# The import is in a `try`, because transformers reads the imports of the file before it runs it, and would advise to
# install a package `andromeda`, which is another one.
_STUB_TEXT = f'''\
"""The classes of this model are those of an installed package; transformers finds them through this file."""

try:
    from andromeda.huggingface import (
        {_IMPORTED}
    )
except ImportError as error:
    raise ImportError(
        "this is an Andromeda model, and its classes are in the package andromeda-kernels; install it: "
        f"pip install --upgrade andromeda-kernels ({{error}})"
    ) from error
'''


class ConfigSaving(PreTrainedConfig):
    """A config that names the classes of its models, so that transformers finds them.

    Args:
        auto_map: where transformers finds each automatic class, when it may trust the code of a saved model. Default:
            the stub that `save_pretrained` writes.
    """

    auto_map: dict[str, Any] = dataclasses.field(default_factory=lambda: dict(AUTO_MAP))

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """See transformers. Also writes the stub that `auto_map` names."""
        self.auto_map = AUTO_MAP | self.auto_map  # a class of the user's own stays
        with _updated(Path(save_directory)) as new:
            (new / STUB).write_text(_STUB_TEXT, encoding="utf-8")
            super().save_pretrained(new)
        if push_to_hub:
            folder, names = Path(save_directory), [STUB, constants.CONFIG_NAME]
            _upload(self, folder, names, kept=f"the config is in {folder}", **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """See transformers."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            kwargs.pop("max_shard_size", None)
            kept = "save_pretrained keeps the config on the disk"
            return _upload(self, Path(folder), os.listdir(folder), *args, kept=kept, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """See transformers. Classes of this package are left out: a saved model must not hold copies of their files."""
        if not _is_ours(cls):
            super().register_for_auto_class(auto_class)


class ModelSaving(PreTrainedModel):
    """A model whose saved folder opens without this package imported, and is never half written."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """See transformers. A projection tied to the embedding stays tied; parts of wrappers in names are removed.

        Every file appears whole. With `push_to_hub` the model is pushed when all of them are in `save_directory`.

        Raises:
            ValueError: no config describes the model: it has a custom embedding, or other tied parameters.
            OSError: something could not be written; names the cause, the data that is left and a remedy.
            ConnectionError: the hub cannot be reached, or refuses the model; it is in `save_directory` then.
        """
        folder = Path(save_directory)
        options = dict(zip(_POSITIONAL, args, strict=False)) | kwargs
        self._check_described()
        if options.get("state_dict") is None:
            options["state_dict"] = self._state_to_save()
        push = options.pop("push_to_hub", False)
        of_hub = {name: options.pop(name) for name in _HUB_OPTIONS if name in options}
        if options.get("distributed_checkpoint"):  # all processes write their own parts into one folder
            super().save_pretrained(save_directory, push_to_hub=push, **options, **of_hub)
            return
        with _updated(folder, options.get("variant")) as new:
            super().save_pretrained(new, **options)
            names = [path.name for path in new.iterdir()]
        if push and names:  # one of several processes writes
            _upload(self, folder, names, kept=f"the model is in {folder}", **of_hub)

    def _check_described(self) -> None:
        """ValueError if loading could not make the modules again from the config; notes in it whether they are tied."""
        owner = f"{type(self).__name__}.save_pretrained"
        base: Any = self.base_model
        if not checkpoint.is_plain_embedding(base.token_emb):
            raise ValueError(
                f"{owner}: embedding_provider must be the default, which loading can make again, got a "
                f"{type(base.token_emb).__name__}; save state_dict() instead"
            )
        config: Any = self.config
        described = ModelConfig(**config.to_arguments())
        if getattr(base, "to_logits", None) is None:  # the wrapper takes the size of the vocabulary from it
            found = dataclasses.replace(
                described,
                num_tokens=getattr(base.token_emb, "num_embeddings", described.num_tokens),
                max_seq_len=base.max_seq_len,
                use_abs_pos_emb=base.pos_emb is not None,
                **dataclasses.asdict(base.attn_layers.config),
            )
        else:
            found = base.wrapper.config
        if described != found:
            ours, theirs = dataclasses.asdict(found), dataclasses.asdict(described)
            names = [name for name in ours if ours[name] != theirs[name]]
            raise ValueError(
                f"{owner}: config must describe the modules, which differ in {', '.join(names)}; make one by "
                "from_andromeda(model.to_andromeda())"
            )
        self.config.tie_word_embeddings = is_tied(base)
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys()

    def _state_to_save(self) -> dict[str, torch.Tensor]:
        """The parameters by the names that loading expects; ValueError if it could not make their ties again."""
        owner = f"{type(self).__name__}.save_pretrained"
        state, problems = checkpoint.rename(self.state_dict(), (), owner)
        if problems:
            raise ValueError(f"{owner}: parameters must have different names\n" + "\n".join(problems))
        _, ties = checkpoint.apart(state, owner)
        kept: Any = self._tied_weights_keys or {}
        if others := [f"{name} and {first}" for name, first in ties.items() if kept.get(name) != first]:
            raise ValueError(
                f"{owner}: parameters must not be one but for the projection and the embedding, got "
                f"{', '.join(others)}; to_andromeda().save keeps them so"
            )
        return state

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]  # a wrapper hides its type
        """See transformers. The card of a repository that has none describes this model."""
        size = kwargs.pop("max_shard_size", None) or "50GB"
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=size)
            kept = "save_pretrained keeps the model on the disk"
            return _upload(self, Path(folder), os.listdir(folder), *args, kept=kept, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """See transformers. Classes of this package are left out: a saved model must not hold copies of their files."""
        if not _is_ours(cls):
            super().register_for_auto_class(auto_class)


def is_tied(transformer: nn.Module) -> bool:
    """Whether the projection to the vocabulary, if there is one, has the weight of the embedding."""
    weight = getattr(getattr(transformer, "to_logits", None), "weight", None)
    return weight is not None and weight is getattr(transformer.token_emb, "weight", None)


def _is_ours(cls: type) -> bool:
    """Whether the stub imports this class. transformers registers every class that it loads through the stub."""
    return cls.__module__.partition(".")[0] == __name__.partition(".")[0]


@contextlib.contextmanager
def _updated(folder: Path, variant: str | None = None) -> Iterator[Path]:
    """A new folder whose files move into `folder` if the block ends without an error. Other files in `folder` stay.

    If there are weights among them, those of an earlier model in `folder` are removed: `from_pretrained` would prefer
    one old file to new parts.

    Raises:
        OSError: something could not be written; names the cause, the data that is left and a remedy.
    """
    if files.is_temporary(folder.name):  # the config of a model, whose files will move together
        yield folder
        return
    files.check_output_folder(folder)
    is_new = not folder.exists()
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with files.temporary_folder(folder, ".model.", folder / "model") as new:
                yield new
                files.flush_tree(new)
                _move(new, folder, variant)
            files.flush(folder)
        except BaseException:
            if is_new:
                with contextlib.suppress(OSError):  # it is not empty
                    folder.rmdir()
            raise


def _move(new: Path, folder: Path, variant: str | None) -> None:
    """Move all files of `new`, in an order in which a kill at any moment leaves no mixture that looks like a model."""
    names = [path.name for path in new.iterdir()]
    index = f"model.safetensors.index{'.' + variant if variant else ''}.json"
    stem = re.escape(f"model.{variant}" if variant else "model")
    weights = re.compile(rf"{stem}(-\d{{5}}-of-\d{{5}})?\.safetensors|{re.escape(index)}")
    if of_weights := sorted(filter(weights.fullmatch, names), key=lambda name: name == index):
        (folder / index).unlink(missing_ok=True)
        for name in of_weights:
            os.replace(new / name, folder / name)
        for path in folder.iterdir():
            if weights.fullmatch(path.name) and path.name not in of_weights:
                path.unlink()
    for name in sorted({*names} - {*of_weights}, key=lambda name: name == constants.CONFIG_NAME):
        os.replace(new / name, folder / name)


def _upload(
    saved: PreTrainedConfig | PreTrainedModel,
    folder: Path,
    names: list[str],
    repo_id: str | None = None,
    *,
    kept: str,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | str | None = None,
) -> CommitInfo:
    """Upload files of `folder` in one commit, with its model card or one for `saved`. See `push_to_hub`."""
    api = HfApi(library_name="andromeda-kernels")
    with explained_push(f"{type(saved).__name__}.push_to_hub", kept):
        repo_id = api.create_repo(repo_id or folder.resolve().name, private=private, token=token, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
        content: dict[str, str | bytes] = {name: str(folder / name) for name in names}
        if (folder / constants.REPOCARD_NAME).is_file():
            content[constants.REPOCARD_NAME] = str(folder / constants.REPOCARD_NAME)
        elif isinstance(saved, PreTrainedModel):
            exists = api.file_exists(repo_id, constants.REPOCARD_NAME, revision=revision, token=token)
            read_with: Any = token  # declared narrower than it is
            card = ModelCard.load(repo_id, token=read_with) if exists else model_card(saved, name=repo_id)
            add_tags(card, [*(saved.model_tags or ()), *([tags] if isinstance(tags, str) else tags or ())])
            content[constants.REPOCARD_NAME] = str(card).encode()
        return api.create_commit(
            repo_id,
            [CommitOperationAdd(name, value) for name, value in content.items()],
            commit_message=commit_message or f"Upload {type(saved).__name__}",
            commit_description=commit_description,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )


@contextlib.contextmanager
def explained_push(owner: str, kept: str) -> Iterator[None]:
    """In the block, an error of the connection to the hub becomes one that says in a line what to do about it.

    Args:
        owner: what the user called.
        kept: a clause about what is not lost.

    Raises:
        ConnectionError: the hub cannot be reached, or refuses the request.
    """
    try:
        yield
    except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, _TransportError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, OfflineModeIsEnabled):
            remedy = "unset HF_HUB_OFFLINE"
        elif isinstance(error, LocalTokenNotFoundError) or status in (401, 403):
            remedy = "log in (`hf auth login`, or the variable HF_TOKEN) with a token that may write there"
        else:
            remedy = "look at the network and at HF_ENDPOINT"
        reason = str(error).strip().partition("\n")[0].rstrip(".:") or type(error).__name__
        if isinstance(error, LocalTokenNotFoundError):
            reason = "there is no token of the hub here"
        raise ConnectionError(
            f"{owner}: cannot push to {constants.ENDPOINT}: {reason}; {kept}. To push, {remedy}"
        ) from error
