"""The server: OpenAI's API over models on this machine. Start reading at `server`, then `app`.

server                         folders -> a listening server
app  http  connections  access  routes, bodies, connections, who may call
schemas  requests              what may be asked -> jobs of token ids
token_engine                   the seam to engines: token ids in, token ids out
built_in  wire  worker         the built-in engine: a supervised process around a Decoder
processors  constraints        what changes a job's logits, there
answering  text_filter  tool_calls  objects   tokens -> text -> documents
"""
