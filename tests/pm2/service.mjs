// A service as far as its manager is concerned: it says what it was told to, starts a child, and runs until stopped.
import { spawn } from "node:child_process";
import { readFileSync } from "node:fs";

const { SAYS, CRASHES } = process.env;
if (SAYS) process.stdout.write(readFileSync(SAYS));
if (CRASHES) process.exit(1);
const child = spawn("sleep", ["1000"], { stdio: "ignore" });
console.log(`started, child ${child.pid}`);
setInterval(() => {}, 1000);
