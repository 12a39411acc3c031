"""The options of the config group `data`."""

from dataclasses import dataclass

from nvfp4_train.data.sources import PYTHON_STDLIB


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, how it is cut, what of it is predicted, and how much of it is held out."""

    path: str = PYTHON_STDLIB
    """"python_stdlib", a text, jsonl, json, csv or parquet file or a folder of them, or the name of a hub dataset."""
    text_column: str = "text"
    """The column of a table or a hub dataset that holds the text; `a.b` is the field `b` of the column `a`."""
    chat_column: str | None = "auto"
    """The column that holds conversations; "auto" is `messages` or `conversations` where there is no text column; null reads text.

    A conversation is a list of {role, content, tool_calls, ...} or of {from, value}. A column `tools` is given to the template.
    The text of a column `system` is the first message of conversations that have no system message.
    """
    chat_template: str | None = None
    """A jinja file to render conversations with; null takes the tokenizer's own template."""
    train_on: str | None = None
    """`all` tokens, or those that an `assistant` writes with the ends of its turns; null is assistant for conversations, else all."""
    special_tokens: str = "text"
    """What a special token that a document spells out is: `text`, or the `control` token, as if a template had put it there."""
    isolate_documents: bool = False
    """Attend to, and predict, nothing across the start of a document. The model is checked for it before training."""
    too_long: str | None = None
    """Where documents may be longer than a sequence: `split` lets all documents go on in the next one, without padding. With `cut` or
    `drop` sequences hold whole documents, padded, and the rest of longer ones, or all of them, is left out. Null is cut for
    conversations, split for text.
    """
    split: str = "train"
    """The split of a hub dataset, or of a folder whose files are named as splits."""
    config_name: str | None = None
    """The configuration of a hub dataset, where it has several, or a folder inside of a local one."""
    streaming: bool = False
    """Read until there are max_documents, and of a hub dataset fetch no more than that."""
    tokenizer: str = "auto"
    """"byte", a folder or hub name; "auto" is the tokenizer of the model's folder or hub name, or "byte" without one."""
    seq_len: int = 256
    """Tokens per sequence."""
    batch_size: int = 8
    """Sequences per rank and micro-batch."""
    val_batch_size: int | None = None
    """Sequences per rank and validation batch; null takes batch_size."""
    val_fraction: float = 0.05
    """Share of the documents that is held out; 1 leaves none to train on, as an evaluation of a whole file wants it."""
    val_sequences: int | None = 64
    """At most so many held-out sequences are used, over all ranks, spread evenly over the held-out text; null takes all."""
    max_documents: int | None = None
    """Only the first so many documents are used; null takes all."""
    num_workers: int = 0
    """Processes that load batches, per rank and loader."""
    restart: bool = False
    """On resume, take the data from its beginning, which may be other data than the checkpoint's run had.

    Once: where the checkpoint's run was itself started so, with the same data, its position in the data is kept.
    """

    def __post_init__(self) -> None:
        for name, least in (("seq_len", 2), ("batch_size", 1), ("num_workers", 0)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"data.{name} must be at least {least}; got {value}")
        for name in ("val_batch_size", "val_sequences", "max_documents"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"data.{name} must be at least 1, or null; got {value}")
        if not 0 < self.val_fraction <= 1:
            raise ValueError(f"data.val_fraction must be above 0 and at most 1; got {self.val_fraction}")
        if self.streaming and self.max_documents is None:
            raise ValueError("data.streaming=true reads until there are data.max_documents documents; set data.max_documents")
        for name in ("path", "text_column", "chat_column", "chat_template", "split", "tokenizer"):
            if getattr(self, name) == "":
                raise ValueError(f"data.{name} must not be empty")
        for name, choices in (
            ("train_on", ("all", "assistant", None)),
            ("special_tokens", ("text", "control")),
            ("too_long", ("split", "cut", "drop", None)),
        ):
            if (value := getattr(self, name)) not in choices:
                known = " or ".join("null" if choice is None else choice for choice in choices)
                raise ValueError(f"data.{name} must be {known}; got {value!r}")

    def check_positions(self, max_position_embeddings: int | None) -> None:
        """Raises ValueError when the sequences are longer than the model takes."""
        if max_position_embeddings is not None and self.seq_len > max_position_embeddings:
            raise ValueError(
                f"the model has {max_position_embeddings} positions; got data.seq_len={self.seq_len}. Lower data.seq_len."
            )
