r"""Converts messages, conversations and images to the model's arrays, and ids to text. Needs no weights and no JAX.

    text    <s> [INST] <image> \n what is shown ? [/INST]
    encode   1  733 …  -200   13  …                         an image is one IMAGE_TOKEN
    expand   1  733 …  -200 × P   13  …                     and P consecutive positions for the model

LLaVA-Med v1.0 represents an image by P `<im_patch>` between `<im_start>` and `<im_end>` (`llava/train/train.py`). With
its templates, `<image>` in a text stands for all of these, `encode` writes the start and end ids around the
IMAGE_TOKEN, and the image stays at its place in a turn: behind the question, where upstream moves it to the front.

B, H, W and I are rows, height, width and images; P is the number of positions of an image.
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from llavamed_jax.checkpoints import hub, model_config
from llavamed_jax.checkpoints.checkpoint import Checkpoint
from llavamed_jax.checkpoints.preprocessor_file import warn_of_image_token
from llavamed_jax.config import IMAGE_TOKEN, OURS, LlavaConfig
from llavamed_jax.errors import UserError, short
from llavamed_jax.images import load as pixels
from llavamed_jax.text import image_positions
from llavamed_jax.text.chat_template import ChatTemplate, find_chat_template
from llavamed_jax.text.conversation import IMAGE_MARKER, image_first, render, supervise, training_turns
from llavamed_jax.text.image_positions import END, START, expand_images, image_token
from llavamed_jax.text.messages import Chat, question, read_messages
from llavamed_jax.text.templates import Template, get_template, template_of
from llavamed_jax.text.tokenizer import Tokenizer, find_tokenizer
from llavamed_jax.utils.files import read_json

_PATCH = 14  # patch size of every tower that LLaVA was released with; used if there is no config


class Processor:
    """Converts text and images to arrays for one model.

    Args:
      config: the model's config, or None for a bare tokenizer.
      tokenizer: the tokenizer; methods that need one raise without it.
      template: a template's name. None takes the config's own template, else `chat_template`, else the default of the
        config's `source`.
      image_size: edge of the tower's input in pixels; only for a bare tokenizer.
      image_mode: `pad` or `square`; None takes the config's.
      chat_template: the checkpoint's own Jinja chat template.

    Attributes:
      config: LlavaConfig, or None for a bare tokenizer.
      image_size: edge of the tower's input in pixels; None if unknown.
      image_mode: `pad` or `square`.
      tokens_per_image: P; None if unknown.
      max_length: tokens of a row in the model's training, images included, or None.
      template_name: the name of the template that writes prompts; None if `chat_template` writes them.
      chat_template: the checkpoint's own chat template; None if `template_name` is set.
    """

    def __init__(self, config: LlavaConfig | None, tokenizer: Tokenizer | None = None, template: str | None = None,
                 image_size: int | None = None, image_mode: str | None = None, *,
                 chat_template: ChatTemplate | None = None):
        """Raises UserError if the template's name, the image size or the image mode is invalid."""
        if image_mode not in (None, *pixels.MODES):
            raise UserError(f"the image mode is {image_mode!r}; {' or '.join(pixels.MODES)} was expected")
        if config is not None and image_size not in (None, config.vision.image_size):
            raise UserError(f"the image size is {image_size}; {config.vision.image_size}, the size of this model's "
                            "tower, was expected")
        if image_size is not None and (not isinstance(image_size, numbers.Integral) or image_size < _PATCH):
            raise UserError(f"the image size is {image_size!r}; a whole number of at least {_PATCH} was expected")
        self.config = config
        self.image_size = config.vision.image_size if config else image_size
        self.image_mode = image_mode or (config.image_aspect_ratio if config else "pad")
        self.tokens_per_image = (config.tokens_per_image if config
                                 else (image_size // _PATCH) ** 2 if image_size else None)
        self.max_length = config.max_length if config else None
        self._tokenizer = tokenizer
        if template is not None:
            get_template(template)  # a name that the user gave fails here, a derived one when text is needed
        self.template_name = template or (config.template if config else None)
        self.chat_template = None if self.template_name else chat_template
        self._is_default = self.template_name is None and self.chat_template is None
        if self._is_default:
            self.template_name = template_of(config)

    @classmethod
    def load(cls, path: str | Path, template: str | None = None, image_size: int | None = None,
             image_mode: str | None = None, tokenizer: str | Path | None = None) -> "Processor":
        """Loads a processor from a checkpoint's directory of any kind, with or without weights, or from a tokenizer.

        Args:
          path: a directory with `config.json` (as released, or transformers'), this project's tree, one step of it or
            its `model/`, `owner/name[@revision]` of a hub, `preset:NAME`, or a tokenizer's file or directory. The tree
            and its step may also be at `gs://BUCKET/KEY` or `s3://BUCKET/KEY`.
          template: `ORIGIN:NAME` or a bare name; None follows the checkpoint.
          image_size: edge of the tower's input in pixels; for a bare tokenizer, which does not know it.
          image_mode: `pad` or `square`; None follows the checkpoint.
          tokenizer: another tokenizer's file or directory.

        Returns:
          The processor.

        Raises:
          UserError: the path does not exist, a file cannot be read, or a template or mode is unknown.
        """
        if not str(path).startswith("preset:"):
            path = hub.local(path, weights=False, may_be_bucket=True)
        directory = model_config.model_directory(Path(path))
        if directory is None and not str(path).startswith("preset:"):
            if not Path(path).exists():
                raise UserError(f"{path} does not exist; a checkpoint's directory or a tokenizer was expected")
            return cls(None, Tokenizer.load(tokenizer or path), template, image_size, image_mode)
        # A tree's `model/` alone is enough here, although it is not a valid PATH of a checkpoint.
        is_inside = directory is not None and read_json(directory / "config.json").get("model_type") == "llavamed_jax"
        config = model_config.tree_config(directory.parent) if is_inside else model_config.read_config(path)
        return cls._from_files(config, directory, tokenizer, template, image_size, image_mode)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, tokenizer: str | Path | None = None,
                        template: str | None = None) -> "Processor":
        """Makes the processor of an open checkpoint, in which the tower may differ from the one that its files name.

        Args:
          checkpoint: the open checkpoint.
          tokenizer: another tokenizer's file or directory.
          template: `ORIGIN:NAME` or a bare name; None follows the checkpoint.

        Raises:
          UserError: as in `load`.
        """
        files = checkpoint.files
        directory = next(iter(files.values())).parent if files else None
        return cls._from_files(checkpoint.config, directory, tokenizer, template)

    @classmethod
    def _from_files(cls, config, directory, tokenizer, template, image_size=None, image_mode=None) -> "Processor":
        """Makes a processor from the files in `directory`, or in its folder `OURS`, where an export keeps them."""
        if directory is not None and (directory / OURS).is_dir():
            directory = directory / OURS
        source = tokenizer or (directory if directory is not None and find_tokenizer(directory) else None)
        of_transformers = config.source == "transformers"
        tok = Tokenizer.load(source, of_transformers) if source is not None else None
        # The originals' directories may hold the language model's own chat template, which has no place for images.
        found = find_chat_template(directory) if directory is not None and of_transformers else None
        image = image_token(config, tok)
        if image is not None and directory is not None:
            warn_of_image_token(directory, image)
        chat_template = (ChatTemplate(found[0], str(found[1]), tok.special_tokens, image or IMAGE_MARKER)
                         if found and tok else None)
        return cls(config, tok, template, image_size, image_mode, chat_template=chat_template)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises UserError if the checkpoint has no tokenizer files."""
        if self._tokenizer is None:
            raise UserError("this checkpoint has no tokenizer files; give one with tokenizer=PATH (--tokenizer PATH)")
        return self._tokenizer

    @property
    def template_words(self) -> str | None:
        """The name of the template that writes prompts, or the file of the checkpoint's own chat template."""
        return self.template_name or (f"the chat template {self.chat_template.file}" if self.chat_template else None)

    @property
    def tokenizer_words(self) -> str | None:
        """The file of the tokenizer; None if there is no tokenizer."""
        return None if self._tokenizer is None else str(self._tokenizer.file)

    @functools.cached_property
    def template(self) -> Template:
        """The named template.

        Raises UserError if the checkpoint has only a Jinja chat template, or if the name is unknown.
        """
        if self.template_name is None:
            raise UserError("this checkpoint has its own chat template, which does not define labels for training; "
                            "name a template, for example v1.5:mistral_instruct or up:vicuna_v1")
        return get_template(self.template_name)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end an answer: the config's, the tokenizer's `eos_token` and the template's end token."""
        ids = self.config.decoder.eos_ids if self.config is not None else ()
        end = self.template.end_token if self.template_name else None
        own = [] if self._tokenizer is None else [self._tokenizer.eos_id, self._tokenizer.id_of(end) if end else None]
        rows = self.config.decoder.vocab_size if self.config is not None else None
        return (*ids, *dict.fromkeys(i for i in own if i is not None and i not in ids and (rows is None or i < rows)))

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end an answer besides the end-of-sequence id.

        The models of v1.0 and v0 write "###" in its place.
        """
        return self.template.stop if self.template_name else ()

    def for_evaluation(self) -> "Processor":
        """Returns the processor for test questions.

        Unless a template is named, v1.0's evaluation uses another one than its chat.
        """
        name = template_of(self.config, is_evaluation=True) if self._is_default else self.template_name
        if name == self.template_name:
            return self
        return Processor(self.config, self._tokenizer, name, self.image_size, self.image_mode)

    @functools.cached_property
    def _is_v1(self) -> bool:
        return self.template_name is not None and self.template.is_v1

    @property
    def _has_start_end(self) -> bool:
        """Whether an image stands between start and end tokens; for a bare tokenizer, whether v1.0's recipe does so."""
        return self.config.use_start_end if self.config is not None else self._is_v1

    def id_of(self, token: str) -> int | None:
        """Returns the id of a special or added token in this model's texts; None if there is no such token."""
        return self.text_tokenizer.id_of(token)

    @property
    def image_marker(self) -> str:
        """The text of an image in prompts: `<image>`, between start and end tokens if the model has them.

        With v1.0's templates `<image>` alone already includes the start and end tokens.
        """
        return f"{START}{IMAGE_MARKER}{END}" if self._has_start_end and not self._is_v1 else IMAGE_MARKER

    def prompt(self, messages: Sequence[dict]) -> str:
        """Writes the prompt of OpenAI chat messages up to where the answer begins, with `<image>` for each image.

        Args:
          messages: objects with `role` and `content`.

        Returns:
          The prompt.

        Raises:
          UserError: messages are out of order, or the number of images does not fit the markers; the error has both
            numbers.
        """
        return self._rendered(read_messages(messages, self.image_marker, is_image_last=self._is_v1))

    def question(self, text: str, images: Sequence = ()) -> str:
        """Writes the prompt of one question, as `prompt` does for one message with these images before this text.

        Args:
          text: the question.
          images: the images; only their number matters.

        Raises:
          UserError: the number of images does not fit the markers in the text.
        """
        return self._rendered(question(text, images, self.image_marker, is_image_last=self._is_v1))

    def _rendered(self, chat: Chat) -> str:
        if self.chat_template is not None:
            return self.chat_template.render(chat)
        template = self.template
        turns = [turn if i % 2 else turn + template.after_question for i, turn in enumerate(chat.turns)]
        is_open = template.labels != "plain"  # for the answer
        return render(template, [*turns, None] if is_open else turns, chat.system)

    def encode(self, text: str) -> list[int]:
        """Encodes a prompt; an image is one IMAGE_TOKEN.

        As in the originals' `tokenizer_image_token`, each text between images is encoded on its own. If the checkpoint
        has transformers' layout and its tokenizer has a token for images, the text is encoded as a whole, as
        transformers' processors do. With v1.0's templates the ids of the start and end tokens stand around an image,
        white space beside the image is dropped, and each `<im_patch>` in the text is an IMAGE_TOKEN too. If a
        checkpoint's own chat template has written the beginning-of-sequence token, no second one is added.

        Args:
          text: a prompt of `prompt` or `question`.

        Returns:
          Token ids.

        Raises:
          UserError: the value is not a text, the text contains a lone surrogate, or the tokenizer lacks the start and
            end tokens or a special token of the template.
        """
        if not isinstance(text, str):
            raise UserError(f"the text to encode is {short(text)}; a str was expected")
        if self._is_v1:
            return image_positions.encode_v1(text, self.text_tokenizer, self._has_start_end)
        tokenizer, image = self._encoder
        absent = [token for token in (START, END) if self._has_start_end and token in text
                  and self.id_of(token) is None]
        if absent:
            raise UserError(f"the model expects images between {START} and {END}, but its tokenizer lacks "
                            f"{' and '.join(absent)}; `python -m convert build --add_image_tokens` adds them")
        begun = self.chat_template is not None and tokenizer.bos_token and text.startswith(tokenizer.bos_token)
        return image_positions.encode(text, tokenizer, image, bos=not begun)

    @functools.cached_property
    def _encoder(self) -> tuple[Tokenizer, str | None]:
        """The tokenizer and its image token. Raises UserError if it lacks a special token that the template writes."""
        if self.template_name:
            self.template.check_tokens(self.id_of, self.tokenizer_words)
        return self.tokenizer, image_token(self.config, self.tokenizer)

    @functools.cached_property
    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer of this model's texts; with v1.0's templates it has v1.0's image tokens."""
        if not self._is_v1:
            return self.tokenizer
        rows = self.config.decoder.vocab_size if self.config is not None else None
        return image_positions.v1_tokenizer(self.tokenizer, rows, self.template.style == "V0", self._has_start_end)

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids to text, without special tokens and images."""
        return self.text_tokenizer.decode(ids)

    @functools.cached_property
    def _marker_length(self) -> int:
        """The number of ids of a text that is one image."""
        return len(self.encode(IMAGE_MARKER))

    def training_example(self, conversations: Sequence[dict], num_images: int | None = None,
                         max_length: int | None = None) -> tuple[list[int], list[int]]:
        """Encodes a LLaVA conversation for training.

        With templates of v1.5 and later the image moves to the front of its turn, and several markers of a turn count
        as one, as in upstream's preprocessing, the only one published for these templates. If `num_images` equals the
        number of markers, several markers of a turn stay at their places, behind their labels, as they do when a
        question is asked. With v1.0's templates every marker stays at its place. An image is one IMAGE_TOKEN.

        Args:
          conversations: the turns, objects with `from` and `value`.
          num_images: the number of images of the sample; None does not check it.
          max_length: the length that the sample will be cut to; None is the model's own. The originals do not check
            their token counts in longer samples.

        Returns:
          Ids and labels. Labels are not shifted, and IGNORE where no loss is computed.

        Raises:
          UserError: speakers do not alternate, or the number of images does not fit the markers.
        """
        turns = training_turns(self.template, conversations)
        marked = [text.count(IMAGE_MARKER) for _, text in turns]
        each = num_images is not None and num_images == sum(marked)
        if not self._is_v1:
            turns = [(speaker, text.replace(IMAGE_MARKER, self.image_marker) if each and count > 1
                      else image_first(text, self.image_marker)) for (speaker, text), count in zip(turns, marked)]
        ids, labels = supervise(self.template, turns, self.encode, pad_id=self.tokenizer.pad_id,
                                marker_length=self._marker_length, is_legacy=self.tokenizer.is_legacy or self._is_v1,
                                max_length=max_length or self.max_length,
                                image_length=self.tokens_per_image or 1 if self._is_v1 else 1)
        if num_images is not None and ids.count(IMAGE_TOKEN) != num_images:
            raise UserError(f"the conversation has {num_images} images for {sum(marked)} {IMAGE_MARKER} markers")
        return ids, labels

    def expand(self, ids: Sequence[int], labels: Sequence[int] | None = None):
        """Applies `expand_images` with this model's P."""
        if self.tokens_per_image is None:
            raise UserError("a bare tokenizer does not know how many positions an image takes; give image_size")
        return expand_images(ids, self.tokens_per_image, labels)

    def images(self, sources: Sequence, mode: str | None = None, frame: int | None = None) -> np.ndarray:
        """Reads images and preprocesses them for the tower.

        Args:
          sources: a list of anything that `images.load.load_image` takes.
          mode: `pad` or `square`; None is the model's own.
          frame: the frame of sources that have several, counted from 1; None is the first, or the one of a path's
            `#frame=N`.

        Returns:
          float32 [I,H,W,3], normalised.

        Raises:
          UserError: the images are not a list, an image cannot be read, or the mode is unknown.
        """
        arrays = self.images_uint8(sources, mode, frame)
        return pixels.normalize(arrays, *self.config.vision.normalization) if self.config else pixels.normalize(arrays)

    def images_uint8(self, sources: Sequence, mode: str | None = None, frame: int | None = None) -> np.ndarray:
        """Reads images as `images` does, without normalisation: uint8 [I,H,W,3].

        The model normalises uint8 images itself.
        """
        if self.image_size is None:
            raise UserError("a bare tokenizer does not know the size of images; give image_size")
        is_array = isinstance(sources, np.ndarray)
        if (not isinstance(sources, Iterable) or isinstance(sources, (str, bytes, bytearray))
                or is_array and sources.ndim != 4):
            raise UserError(f"images were given as a {type(sources).__name__}; a list of images was expected, even for "
                            "one image")
        size, mode = self.image_size, self.image_mode if mode is None else mode
        vision = self.config.vision if self.config else None
        settings = (vision.images, vision.pad_color if mode == "pad" else None) if vision else ()
        arrays = [pixels.preprocess_uint8(pixels.load_image(source, frame), size, mode, *settings)
                  for source in sources]
        return np.stack(arrays) if arrays else np.zeros((0, size, size, 3), np.uint8)
