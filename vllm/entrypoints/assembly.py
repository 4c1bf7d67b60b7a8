"""Puts the rooms together: one object for each API, made once for a running engine, and the application of them all."""

from __future__ import annotations

import argparse

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from vllm import envs
from vllm.engine.async_llm_engine import AsyncLLMEngine
from vllm.entrypoints import invocations
from vllm.entrypoints.anthropic import request as anthropic_request
from vllm.entrypoints.anthropic import routes as anthropic_routes
from vllm.entrypoints.anthropic.serving import ServingMessages
from vllm.entrypoints.chat.answer_format import AnswerReader
from vllm.entrypoints.chat.prompts import PromptReader
from vllm.entrypoints.chat.served_models import ServedModels
from vllm.entrypoints.chat.service import ChatService
from vllm.entrypoints.http.app import admin_key, make_app
from vllm.entrypoints.http.development_routes import development_routes
from vllm.entrypoints.http.middleware import AdminGuard
from vllm.entrypoints.http.openapi import Bodies
from vllm.entrypoints.http.request_log import RequestLog
from vllm.entrypoints.http.status_routes import status_routes
from vllm.entrypoints.openai import routes as openai_routes
from vllm.entrypoints.openai import system_prompt_routes
from vllm.entrypoints.openai.chat_completions import ServingChat
from vllm.entrypoints.openai.completions import ServingCompletion
from vllm.entrypoints.openai.explanations import ServingExplanations
from vllm.entrypoints.openai.models import ServingModels
from vllm.entrypoints.openai.system_prompts import ServingSystemPrompts
from vllm.entrypoints.openai.tokenization import ServingTokenization
from vllm.entrypoints.responses import routes as responses_routes
from vllm.entrypoints.responses.serving import ServingResponses
from vllm.entrypoints.web.history import History
from vllm.entrypoints.web.routes import OPEN_PATHS as WEB_PATHS
from vllm.entrypoints.web.routes import web_routes

# Models whose answers can be read in one way only, which holds unless a flag names another.
_OWN_REASONING = {"gpt_oss": "openai_gptoss"}

BODIES: Bodies = {
    **openai_routes.BODIES,
    **system_prompt_routes.BODIES,
    **responses_routes.BODIES,
    **anthropic_routes.BODIES,
    **invocations.BODIES,
}


class Services:
    """All that the routes and `run-batch` hand requests to.

    Args:
        args: The flags of `args.cli_args`.
    """

    def __init__(self, engine: AsyncLLMEngine, args: argparse.Namespace) -> None:
        log = RequestLog.from_args(args)
        always_usage = args.enable_force_include_usage
        models = ServedModels(engine.vllm_config, args.fingerprint_mode, args.fingerprint_value)
        self.prompts = prompts = PromptReader(engine, args.default_chat_template_kwargs)
        answers = AnswerReader(
            args.tool_call_parser,
            auto_tools=args.enable_auto_tool_choice,
            reasoning_parser=args.reasoning_parser or _OWN_REASONING.get(engine.vllm_config.model.hf_config.model_type),
        )
        chat = ChatService(
            engine,
            models,
            prompts,
            args.response_role,
            args.return_tokens_as_token_ids,
            answers,
            args.exclude_tools_when_tool_choice_none,
            log,
        )
        self.models = ServingModels(engine.vllm_config.model, models)
        self.chat = ServingChat(chat, engine.lanes, models.fingerprint, always_usage)
        self.completion = ServingCompletion(engine, models, prompts, args.return_tokens_as_token_ids, always_usage, log)
        self.messages = ServingMessages(chat, models, prompts)
        self.responses = ServingResponses(engine, models, prompts, chat)
        self.tokenization = ServingTokenization(engine, models, prompts)
        self.system_prompts = ServingSystemPrompts(engine, prompts)
        dialects = (self.responses.explained_chat, anthropic_request.explained_chat)
        self.explanations = ServingExplanations(engine, prompts, chat, dialects)


def build_app(engine: AsyncLLMEngine, args: argparse.Namespace) -> FastAPI:
    """The application for a running engine; `args` are the flags of `args.cli_args`.

    `app.state.history` is what the page draws; whoever serves the application runs it beside.
    """
    services, registry = Services(engine, args), CollectorRegistry()
    routers = [
        openai_routes.completion_routes(engine, services.chat, services.completion),
        invocations.invocation_routes(engine, services.chat, services.completion, services.responses),
        responses_routes.responses_routes(engine, services.responses),
        anthropic_routes.messages_routes(engine, services.messages),
        openai_routes.model_routes(services.models),
        openai_routes.tokenization_routes(services.tokenization),
        system_prompt_routes.system_prompt_routes(
            services.system_prompts, services.explanations, AdminGuard(admin_key(args), own_pages=args.web)
        ),
        status_routes(engine, registry),
    ]
    if envs.server_dev_mode():
        routers.append(development_routes(engine))
    history = History(engine.metrics_registry)
    if args.web:
        routers.append(web_routes(history))
    app = make_app(args, routers, BODIES, engine.lanes, registry, open_paths=WEB_PATHS if args.web else ())
    app.state.history = history
    return app
