"""Writes the token ids that llama.cpp gives for awkward strings, as JSON on stdout.

Run by hand with llama-cpp-python installed (0.3.36 made the file beside this one); it is no dependency of the tests:

    python make_llamacpp_tokens.py SmolLM2-135M-Instruct.Q4_1.gguf > smollm2_llamacpp_tokens.json
"""

import json
import sys

import llama_cpp

STRINGS = [
    "Hello world",
    " Hello world",
    "Hello  world   again",
    "hello\tworld\t\ttabs",
    "line one\nline two\n\nline four\n\n\n\nline eight",
    "\n",
    "\n\n\n",
    " \n \n",
    "  \n\t \n   x",
    "trailing spaces   ",
    "   leading spaces",
    " ",
    "          ",
    "\r\nwindows\r\nlines\r\n",
    "carriage\rreturn",
    "0",
    "1234567890",
    "3.14159 and -2,718.28",
    "2024-12-31T23:59:59Z",
    "room 101b, 42nd floor",
    "x1y2z3",
    "1 2  3   4",
    "phone: +1 (555) 010-9999",
    "0xDEADBEEF 0b1010",
    "\u0663\u0664\u0665",
    "\u0967\u0968\u0969 rupees",
    "x\u00b2 + y\u00b3 = z\u2074",
    "\u00bd cup, \u00be mile, \u2155",
    "\u2167 \u2460 \u3007 \u4e00",
    "\uff11\uff12\uff13\uff21\uff22",
    "\u4f60\u597d\uff0c\u4e16\u754c\uff01",
    "\u6771\u4eac\u306f\u65e5\u672c\u306e\u9996\u90fd\u3067\u3059\u3002",
    "\uc548\ub155\ud558\uc138\uc694 \uc138\uacc4",
    "\u4eca\u592920\u5ea6",
    "\U0001f600\U0001f680 launch \U0001f4a5!",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 family",
    "\U0001f44d\U0001f3fd \U0001f1e9\U0001f1ea",
    "I'm you're he'll they've it's I'd can't",
    "I'M YOU'RE HE'LL THEY'VE IT'S I'D CAN'T",
    "\u2019tis the season; don\u2019t",
    "'s 't 're",
    "e\u0301 vs \u00e9; a\u0308\u0304",
    "Z\u0351\u036b\u0343a\u0363lgo",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645",
    "\u05e9\u05dc\u05d5\u05dd 5 \u05e2\u05d5\u05dc\u05dd",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440!",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e",
    "Gr\u00fc\u00dfe aus K\u00f6ln \u2013 Stra\u00dfe 7\u00bd",
    "mixed\u6df7\u5408\u043c\u0456\u043a\u0441 1\u4e002",
    "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nHi 12<|im_end|>\n<|im_start|>assistant\n",
    "a<|im_end|> b <|endoftext|>c",
    "<|im_start|><|im_start|>",
    "<|im_en d|> <|im_end| >",
    "<repo_name>x<file_sep>y<reponame>",
    "def f(x: int) -> int:\n    return x ** 2  # square\n",
    "for(int i=0;i<10;++i){a[i]+=b[i]*3;}",
    '{"key": [1, 2.5, null], "s": "\\u00e9\\n"}',
    "SELECT * FROM t WHERE id >= 100 AND name != 'x';",
    "https://example.com/a/b?c=1&d=%20e#f",
    "\u0001\u0002\u001b[31mred\u001b[0m\u007f",
    "non\u00a0breaking\u2003em\u3000ideographic\u2028line",
    "zero\u200bwidth\ufeffbom\u00adhyphen",
    "\u20ac100 \u00a35 \u00a5\u0661\u0662",
    "!!!???...---___***",
    "\u2014\u201cquoted\u201d\u2026",
    "\u2211\u222b\u2202x dx = \u221e",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "\ufffd \ue000 \U00010348",
    "Tab\there  and\u0009 there\n\tindented 4\n\t\t8",
]


def main() -> None:
    model = llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False)
    pairs = [{"text": s, "ids": model.tokenize(s.encode(), add_bos=False, special=True)} for s in STRINGS]
    print("[\n" + ",\n".join(json.dumps(pair) for pair in pairs) + "\n]")


if __name__ == "__main__":
    main()
