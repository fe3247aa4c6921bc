"""A LangGraph agent: a model and its tools in a loop, streamed over chat completions."""

from __future__ import annotations

from langchain_core.messages import AnyMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition


@tool
def look_up(word: str) -> str:
    """Looks a word up."""
    return f"{word}-{4700 + 11}"


model = ChatOpenAI(model="default", streaming=True).bind_tools([look_up])


def think(state: MessagesState) -> dict[str, list[AnyMessage]]:
    return {"messages": [model.invoke(state["messages"])]}


graph = StateGraph(MessagesState)
graph.add_node("think", think)
graph.add_node("tools", ToolNode([look_up]))
graph.add_edge(START, "think")
graph.add_conditional_edges("think", tools_condition)
graph.add_edge("tools", "think")
print(graph.compile().invoke({"messages": [("user", "run it please")]})["messages"][-1].content)
