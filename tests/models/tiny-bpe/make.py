"""Makes tokenizer.json and tiny-bpe.gguf: a small BPE vocabulary in Gemma's style, trained on text made here.

python tests/models/tiny-bpe/make.py          (needs tokenizers and gguf)
"""

import json
import random
from pathlib import Path

from gguf import GGUFWriter, TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

HERE = Path(__file__).parent
CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|tool>", "<tool|>", "<|think|>", "<|turn>", "<turn|>"]
CONTROL += ["<|image>", "<|image|>"]
USER_DEFINED = ["<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>']
USER_DEFINED += ["<|channel>", "<channel|>", "[[", "[[["]
TEXT = """
the of and to in is that for it as was with be by on not he his but at are this have from or had an they which one you
were all their there been many some time very when much can new over such our man only those even most make after also
did before must through years where way well down should because each just people how too little state good world still
diffusion block canvas token model layer router expert entropy temperature sample decode encode language machine
learning light water house river mountain morning evening winter summer answer question letter number village garden
kitchen bread runs running runner walked walking works worked working wonder wonderful thinking thought something
nothing everything return int static const char size void for while if else struct float double def self import class
lambda yield print None
der die das und ist nicht ein eine mit auf für über schön größer können müßte Straße Mädchen wäre Übung
le la les des est été où garçon élève français naïve cœur déjà peut-être aujourd'hui
и в не на что быть он с это по но они мы этот который из весь свой год человек время день рука дело жизнь
的 一 是 不 了 在 人 有 我 他 这 中 大 来 上 国 个 到 说 们 天空 为什么 蓝色 你好 世界
これ は です ます する こと ない ある 日本 今日 ありがとう
"""
TEMPLATE = """{{ bos_token }}
{%- if enable_thinking or tools or messages[0].role == 'system' -%}
<|turn>system
{% if enable_thinking %}<|think|>
{% endif -%}
{%- if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% endif -%}
{%- for tool in tools or [] %}<|tool>{{ tool | tojson }}<tool|>{% endfor -%}
<turn|>
{% endif -%}
{%- for message in messages if message.role != 'system' -%}
{%- if message.role not in ['user', 'assistant'] %}{{ raise_exception('unknown role ' ~ message.role) }}{% endif -%}
<|turn>{{ 'model' if message.role == 'assistant' else message.role }}
{{ message.content | trim }}<turn|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|turn>model
{% if not enable_thinking %}<|channel>thought
<channel|>{% endif -%}
{%- endif -%}
"""


def lines(n):
    """Lines of words, earlier ones more often, with the punctuation and the numbers of prose and code."""
    draw, known = random.Random(4), TEXT.split()
    for _ in range(n):
        words = []
        for _ in range(4 + int(draw.random() * 12)):
            word = known[int(len(known) * draw.random() ** 1.3)]
            kind = draw.random()
            if kind < 0.1:
                word = word.capitalize()
            elif kind < 0.16:
                word = str(int(10 ** (4 * draw.random())))
            words.append(word + [",", ".", ";", "()", ":", " =", "", "", "", ""][int(10 * draw.random())])
        yield " " * (4 * int(3 * draw.random() ** 3)) + " ".join(words)


def runs(of, longest):
    """The tokens for runs of a character, and all ways to merge them, the longest results first."""
    tokens = [of * n for n in range(1, longest + 1)]
    merges = [(of * n, of * (m - n)) for m in range(longest, 1, -1) for n in range(m - 1, 0, -1)]
    return tokens, merges


def main():
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split(Regex("▁?[^▁]+|▁+"), "isolated")
    trained.train_from_iterator(lines(3000), trainers.BpeTrainer(vocab_size=900, show_progress=False))
    learnt = trained.get_vocab()
    learnt_merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]

    newlines, newline_merges = runs("\n", 31)
    blanks, blank_merges = runs("▁", 31)
    tokens = [*CONTROL, *USER_DEFINED, *newlines, *blanks[1:], *(f"<0x{b:02X}>" for b in range(256))]
    tokens += [t for t in sorted(learnt, key=learnt.get) if t not in set(tokens)]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = list(dict.fromkeys(newline_merges + blank_merges + learnt_merges))

    tiny = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tiny.normalizer = normalizers.Replace(" ", "▁")
    tiny.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tiny.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tiny.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in CONTROL])
    tiny.add_tokens([AddedToken(t, normalized=False, special=False) for t in USER_DEFINED])
    tiny.save(str(HERE / "tokenizer.json"), pretty=False)

    kinds = dict.fromkeys(CONTROL, TokenType.CONTROL) | dict.fromkeys(USER_DEFINED, TokenType.USER_DEFINED)
    kinds |= {f"<0x{b:02X}>": TokenType.BYTE for b in range(256)}
    writer = GGUFWriter(HERE / "tiny-bpe.gguf", "diffusion-gemma")
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list(tokens)
    writer.add_token_scores([-1000.0] * len(tokens))
    writer.add_token_types([kinds.get(t, TokenType.NORMAL) for t in tokens])
    writer.add_token_merges([f"{left} {right}" for left, right in merges])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_mask_token_id(4)
    writer.add_chat_template(TEMPLATE)
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    print(f"{len(tokens)} tokens, {len(merges)} merges")


if __name__ == "__main__":
    main()
