"""What answers requests: one object for each API, made once for a running engine."""

from __future__ import annotations

import argparse

from vllm.engine.async_llm_engine import AsyncLLMEngine
from vllm.entrypoints.anthropic.serving import ServingMessages
from vllm.entrypoints.chat.answers import AnswerReader
from vllm.entrypoints.chat.prompts import PromptReader
from vllm.entrypoints.http.request_log import RequestLog
from vllm.entrypoints.openai.chat_completions import ServingChat
from vllm.entrypoints.openai.completions import ServingCompletion
from vllm.entrypoints.openai.explanations import ServingExplanations
from vllm.entrypoints.openai.models import ServingModels
from vllm.entrypoints.openai.system_prompts import ServingSystemPrompts
from vllm.entrypoints.openai.tokenization import ServingTokenization
from vllm.entrypoints.responses.serving import ServingResponses


class Services:
    """All that the routes and `run-batch` hand requests to.

    Args:
        args: The flags of `cli_args`.
    """

    def __init__(self, engine: AsyncLLMEngine, args: argparse.Namespace) -> None:
        log = RequestLog.from_args(args)
        self.models = ServingModels(engine.vllm_config, args.fingerprint_mode, args.fingerprint_value)
        self.prompts = PromptReader(engine, args.default_chat_template_kwargs)
        self.chat = ServingChat(
            engine,
            self.models,
            self.prompts,
            args.response_role,
            args.return_tokens_as_token_ids,
            AnswerReader(
                args.tool_call_parser,
                auto_tools=args.enable_auto_tool_choice,
                reasoning_parser=args.reasoning_parser,
            ),
            args.exclude_tools_when_tool_choice_none,
            args.enable_force_include_usage,
            log,
        )
        self.completion = ServingCompletion(
            engine, self.models, self.prompts, args.return_tokens_as_token_ids, args.enable_force_include_usage, log
        )
        self.messages = ServingMessages(self.chat, self.models, self.prompts)
        self.responses = ServingResponses(engine, self.models, self.prompts, self.chat)
        self.tokenization = ServingTokenization(engine, self.models, self.prompts)
        self.system_prompts = ServingSystemPrompts(engine, self.prompts)
        self.explanations = ServingExplanations(engine, self.prompts, self.chat, self.responses)
