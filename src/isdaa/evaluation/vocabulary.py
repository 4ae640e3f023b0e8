"""Which tokenizer an evaluation uses, and which ids its models have in common; a line says what comes from another place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isdaa.errors import UserError
from isdaa.models.places import TOKENIZER_CONFIG, adapter_base, adapter_config, base_named, local_folder, tokenizer_places
from isdaa.terminal import say

REFERENCE = "the reference"
Place = tuple[str, str | None]  # a folder or Hub name, and its revision


@dataclass(frozen=True)
class Vocabulary:
    """Rows of each model's embeddings, by path; a model whose configuration does not say is not in it."""

    rows: Mapping[str, int]

    @property
    def common(self) -> int | None:
        """Ids below it are ids of every model."""
        return min(self.rows.values(), default=None)

    def cut(self, path: str) -> int | None:
        """The rows that are left of a model which has more than another; None: it keeps them all."""
        return self.common if self.rows.get(path, self.common) != self.common else None

    def told(self, labels: Mapping[str, str]) -> Iterator[str]:
        """A line where the models have not equally many rows. labels: what people call each path, one of them `REFERENCE`."""
        if self.common is None or not any(map(self.cut, self.rows)):
            return
        names = {rows: [labels[path] for path in self.rows if self.rows[path] == rows] for rows in self.rows.values()}
        counts = ", ".join(f"{_and_reference(names[rows])} {rows}" for rows in sorted(names, reverse=True))
        yield (
            f"rows of the embeddings: {counts}; ids from {self.common} on, which not all models have, are left out of samples, "
            "KL and logps of every model"
        )


@dataclass(frozen=True)
class Chosen:
    """The tokenizer of an evaluation. own: path -> the tokenizer of a model, where it has one."""

    tokenizer: Any
    place: str
    own: Mapping[str, Any]


def choose(
    models: Sequence[str],
    reference: str,
    *,
    given: str | None = None,
    conversations: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Chosen:
    """The tokenizer `given`, else that of the first model that has one, else the reference's; all must agree on ids of tokens.

    conversations: prompts need a chat template, which is taken from the model's base or the reference where it has none.
    Raises UserError where there is none, one cannot be read, or two of them give a token different ids.
    """
    from isdaa.models.loading import load_tokenizer

    loaded: dict[Place, Any] = {}

    def load(place: Place) -> Any:
        if place not in loaded:
            loaded[place] = load_tokenizer(place[0], trust_remote_code=trust_remote_code, revision=place[1])
        return loaded[place]

    paths = {path: revision if path == reference else None for path in (*models, reference)}
    places = {path: next(tokenizer_places(path, at), None) for path, at in paths.items()}
    own: dict[str, Any] = {}
    for path, found in places.items():
        try:
            if found is not None:
                adapter = adapter_config(path, local_folder(path), paths[path]) if found[0] != path else None
                with base_named(adapter, path):
                    own[path] = load(found)
        except UserError:
            if given is None:
                raise
    if given is not None:
        source, tokenizer, where = given, load_tokenizer(given, trust_remote_code=trust_remote_code), given
        say(f"tokenizer: that of {given}, for every model")
    elif not own:
        raise UserError(f"{models[0]}: no tokenizer (tokenizer.json) in it, nor in {reference}; name one with --tokenizer PATH")
    else:
        source, tokenizer = next(iter(own.items()))
        where = (places[source] or (source,))[0]
        _say_places(models, reference, places, source)
    check_tokenizers([source, *own], [tokenizer, *own.values()])
    if conversations:
        beside = _template_in(models[0]) if given is None and (places[models[0]] or ("",))[0] != models[0] else None
        if beside is not None:
            tokenizer.chat_template = beside
            say(f"chat template: that of {models[0]}, with the tokenizer of {where}")
        if not tokenizer.chat_template:
            _borrow_template(tokenizer, where, [source, *paths], paths, load)
    return Chosen(tokenizer, where, own)


def _say_places(models: Sequence[str], reference: str, places: Mapping[str, Place | None], source: str) -> None:
    """One line for each place that the tokenizers of some models are taken from."""
    taken: dict[str, list[str]] = {}
    for path in dict.fromkeys(models):
        place = places[path] or places[source]
        if place is not None and place[0] != path:
            taken.setdefault(place[0], []).append(path)
    for name, lacking in taken.items():
        which = " (the reference)" if name == reference else ""
        say(f"{_several(lacking)}: no tokenizer there; that of {name}{which} is used")


def _borrow_template(
    tokenizer: Any, where: str, paths: Sequence[str], revisions: Mapping[str, str | None], load: Callable[[Place], Any]
) -> None:
    """Give a tokenizer the chat template of a model's base or of the reference, if it has all its tokens under the same ids."""
    vocabulary = tokenizer.get_vocab()
    for path in dict.fromkeys(paths):
        for place in tokenizer_places(path, revisions.get(path)):
            try:
                other = load(place)
            except UserError:
                continue
            if other.chat_template and all(vocabulary.get(token) == index for token, index in other.get_vocab().items()):
                tokenizer.chat_template = other.chat_template
                say(f"{where}: its tokenizer has no chat template; that of {place[0]}, of the same vocabulary, is used")
                return


def _template_in(path: str) -> str | None:
    """The chat template in a folder that has no tokenizer."""
    from isdaa.foreign import read_object

    folder = local_folder(path)
    if folder is None:
        return None
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    config = folder / TOKENIZER_CONFIG
    found = read_object(config).get("chat_template") if config.is_file() else None
    return found if isinstance(found, str) else None


def vocabulary_of(
    models: Sequence[str], reference: str, trust_remote_code: bool = False, revision: str | None = None
) -> Vocabulary:
    """The rows of all models' embeddings, without their weights. Raises UserError where a configuration cannot be read."""
    from isdaa.models.vocabulary_rows import vocabulary_rows

    found = {
        path: vocabulary_rows(path, trust_remote_code=trust_remote_code, revision=revision if path == reference else None)
        for path in dict.fromkeys([*models, reference])
    }
    return Vocabulary({path: rows for path, rows in found.items() if rows is not None})


def check_ids(vocabulary: Vocabulary, chosen: Chosen, reference: str, rows: Sequence[Mapping[str, Any]], stop: set[int]) -> None:
    """Raises UserError where a prompt, a response or its end would need an id that a model lacks.

    Where the models have not equally many rows, no token but a padding token may have an id that one of them lacks.
    rows: of prompts and held-out pairs, with `…_ids`. stop: ids that end a response.
    """
    common = vocabulary.common
    if common is None:
        return
    short = next(path for path in reversed(list(vocabulary.rows)) if vocabulary.rows[path] == common)  # the reference first
    most = max(vocabulary.rows.values())
    if most == common:
        remedy = "name the models' own tokenizer with --tokenizer PATH"
    elif short == reference:
        remedy = (
            f"name as --reference the model as training began, with these rows: model.resize_token_embeddings({most}), saved "
            "with this tokenizer"
        )
    else:
        remedy = f"name as --reference the model that {short} was trained from, or evaluate {short} apart"

    def refuse(what: str, tokenizer: Any, index: int) -> UserError:
        token = tokenizer.convert_ids_to_tokens(index)
        return UserError(f"{what} {token!r} (id {index}), and {short} has {common} rows of embeddings; {remedy}")

    for path, tokenizer in {chosen.place: chosen.tokenizer, **chosen.own}.items() if most > common else ():
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id != tokenizer.eos_token_id else None
        strange = min((index for index in tokenizer.get_vocab().values() if index >= common and index != padding), default=None)
        if strange is not None:
            raise refuse(f"{path}: its tokenizer has", tokenizer, strange)
    beyond = sorted(index for index in stop if index >= common)
    if beyond and (most > common or len(beyond) == len(stop)):
        raise refuse(f"{chosen.place}: responses end with", chosen.tokenizer, beyond[0])
    for row in rows:
        highest = max((max(ids, default=0) for name, ids in row.items() if name.endswith("_ids")), default=0)
        if highest >= common:
            raise refuse(
                f"{row.get('prompt_id') or row.get('id')}: the tokens of its prompt or responses have", chosen.tokenizer, highest
            )


def base_remarks(
    models: Sequence[str], reference: str, recorded: Mapping[str, str | None], digest_of: Callable[[str], str]
) -> Iterator[str]:
    """A line for each base model of adapters that differs from the reference.

    recorded: the reference that a model's record names. digest_of: the digest of a folder's model.
    """
    others: dict[str, list[str]] = {}
    for path in dict.fromkeys(models):
        base = adapter_base(folder) if (folder := local_folder(path)) is not None else None
        if base is None or _same(base, reference) or ((known := recorded.get(path)) and _same(known, reference)):
            continue
        if local_folder(base) is None or digest_of(base) != digest_of(reference):
            others.setdefault(base, []).append(path)
    for base, adapters in others.items():
        yield (
            f"{_several(adapters)}: trained from {base} (base_model_name_or_path in adapter_config.json), not from the reference "
            f"{reference}; KL is from the reference"
        )


def _same(one: str, other: str) -> bool:
    return one == other or Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def _and_reference(names: Sequence[str]) -> str:
    """The first name, how many others there are, and the reference if it is among them."""
    others = [name for name in names if name != REFERENCE]
    if len(others) == len(names):
        return _several(names)
    more = [f"{len(others) - 1} more"] if len(others) > 1 else []
    return " and ".join(filter(None, [", ".join([*others[:1], *more]), REFERENCE]))


def _several(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def check_tokenizers(
    paths: Sequence[str],
    tokenizers: Sequence[Any],
    advice: str = "policies and reference must share one vocabulary; name the model that training began with as the reference",
) -> None:
    """Raises UserError, with the advice, where a token has different ids in two tokenizers: their models have no KL."""
    first = tokenizers[0].get_vocab()
    for path, tokenizer in zip(paths[1:], tokenizers[1:], strict=True):
        other = tokenizer.get_vocab()
        strange = next((token for token, index in first.items() if other.get(token, index) != index), None)
        if strange is not None:
            raise UserError(
                f"{path}: its tokenizer gives {strange!r} id {other[strange]}, that of {paths[0]} {first[strange]}: {advice}"
            )
        texts = {index: token for token, index in first.items()} if other != first else {}
        added = {*tokenizers[0].added_tokens_decoder, *tokenizer.added_tokens_decoder}  # one may be called otherwise
        renamed = ((token, index) for token, index in other.items() if texts.get(index, token) != token and index not in added)
        token, index = next(renamed, (None, 0))
        if token is not None:
            raise UserError(f"{path}: id {index} of its tokenizer is {token!r}, in that of {paths[0]} {texts[index]!r}: {advice}")
