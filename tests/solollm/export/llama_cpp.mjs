// Answers the questions of test_llama_cpp.py with the real llama.cpp, by the node-llama-cpp package:
// node llama_cpp.mjs PACKAGE QUESTIONS ANSWERS
//   questions: {model, texts, ids}; answers: {tokens, rows, special}, where `tokens` are the ids of
//   each text and `rows` the probabilities, by id, of what follows each of `ids`.
import fs from "node:fs";
import {pathToFileURL} from "node:url";

const [, , home, questions, answers] = process.argv;
const entry = pathToFileURL(`${home}/node_modules/node-llama-cpp/dist/index.js`);
const {getLlama, LlamaLogLevel} = await import(entry);
const asked = JSON.parse(fs.readFileSync(questions));
const llama = await getLlama({
    gpu: false, build: "never", skipDownload: true, logLevel: LlamaLogLevel.error
});
const model = await llama.loadModel({modelPath: asked.model, gpuLayers: 0, useMmap: false});
const context = await model.createContext({
    contextSize: 256, batchSize: 256, threads: 1, flashAttention: false,
    experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"
});
const wanted = {generateNext: {probabilities: true}};
const found = await context.getSequence().controlledEvaluate(asked.ids.map((id) => [id, wanted]));
fs.writeFileSync(answers, JSON.stringify({
    tokens: asked.texts.map((text) => [...model.tokenize(text, false)]),
    rows: found.map((place) => [...place.next.probabilities.entries()]),
    special: {
        bos: model.tokens.bos, eos: model.tokens.eos, eot: model.tokens.eot,
        begins: model.tokens.shouldPrependBosToken
    }
}));
process.exit(0);
