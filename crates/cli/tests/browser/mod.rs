//! A Chromium without a window, over the DevTools protocol: on a pipe, so that neither a port nor a library is needed.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use base64::prelude::{BASE64_STANDARD, Engine as _};
use serde_json::{Value, json};

use super::command::find;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// The browser, where there is one. Where MSRGATE_LANE_REQUIRE is 1 there must be.
pub(crate) fn chromium() -> Option<PathBuf> {
    let found = ["chromium", "chromium-browser", "google-chrome"]
        .into_iter()
        .find_map(find);
    if found.is_none() {
        let why = "there is no chromium";
        assert!(
            std::env::var_os("MSRGATE_LANE_REQUIRE").is_none_or(|value| value != "1"),
            "{why}"
        );
        println!("skipped: {why}");
    }
    found
}

/// What a page is looked at with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Look {
    pub(crate) width: u32,
    pub(crate) height: u32,
    /// `light` or `dark`.
    pub(crate) scheme: &'static str,
    pub(crate) script: bool,
}

/// One page in a browser of its own, which ends with it.
pub(crate) struct Page {
    child: Child,
    to: ChildStdin,
    from: Receiver<Value>,
    session: String,
    last: u64,
    /// Messages that were no answers.
    told: Vec<Value>,
}

impl Page {
    /// An empty one. `folder` is for what the browser keeps.
    pub(crate) fn new(program: &Path, folder: &Path) -> Page {
        let mut child = Command::new("sh")
            // The protocol's pipes are descriptors 3 and 4.
            .args(["-c", "exec \"$@\" 3<&0 4>&1 </dev/null >/dev/null", "sh"])
            .arg(program)
            .args("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars".split(' '))
            .args("--disable-background-networking --disable-component-update --disable-sync".split(' '))
            .arg("--remote-debugging-pipe")
            .arg(format!("--user-data-dir={}", folder.join("profile").display()))
            .arg("about:blank")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("a browser");
        let to = child.stdin.take().expect("a pipe");
        let mut out = BufReader::new(child.stdout.take().expect("a pipe"));
        let (sender, from) = channel();
        std::thread::spawn(move || {
            let mut message = Vec::new();
            while out.read_until(0, &mut message).is_ok_and(|bytes| bytes > 0) {
                message.pop();
                let parsed = serde_json::from_slice(&message).expect("a message");
                if sender.send(parsed).is_err() {
                    return;
                }
                message.clear();
            }
        });
        let mut page = Page {
            child,
            to,
            from,
            session: String::new(),
            last: 0,
            told: Vec::new(),
        };
        let target = page.call("Target.createTarget", json!({ "url": "about:blank" }));
        let attached = page.call(
            "Target.attachToTarget",
            json!({ "targetId": target["targetId"], "flatten": true }),
        );
        page.session = attached["sessionId"].as_str().expect("a session").to_owned();
        for domain in ["Page", "Runtime", "Log", "Network"] {
            page.call(&format!("{domain}.enable"), json!({}));
        }
        page
    }

    /// Opens a file; what was before is forgotten.
    pub(crate) fn show(&mut self, file: &Path, look: Look) {
        self.told.clear();
        self.call(
            "Emulation.setDeviceMetricsOverride",
            json!({
                "width": look.width, "height": look.height, "deviceScaleFactor": 1, "mobile": look.width < 600,
            }),
        );
        let scheme = json!({ "name": "prefers-color-scheme", "value": look.scheme });
        self.call("Emulation.setEmulatedMedia", json!({ "features": [scheme] }));
        self.call("Emulation.setScriptExecutionDisabled", json!({ "value": !look.script }));
        self.call("Page.navigate", json!({ "url": format!("file://{}", file.display()) }));
        while !self
            .told
            .iter()
            .any(|message| message["method"] == "Page.loadEventFired")
        {
            self.next();
        }
    }

    fn next(&mut self) -> u64 {
        let message = self.from.recv_timeout(PATIENCE).expect("the browser speaks");
        let id = message["id"].as_u64().unwrap_or(0);
        self.told.push(message);
        id
    }

    pub(crate) fn call(&mut self, method: &str, parameters: Value) -> Value {
        self.last += 1;
        let mut message = json!({ "id": self.last, "method": method, "params": parameters });
        if !self.session.is_empty() {
            message["sessionId"] = json!(self.session);
        }
        self.to
            .write_all(message.to_string().as_bytes())
            .expect("the browser listens");
        self.to.write_all(&[0]).expect("the browser listens");
        while self.next() != self.last {}
        let mut answer = self.told.pop().expect("an answer");
        assert!(answer["error"].is_null(), "{method}: {answer}");
        answer["result"].take()
    }

    /// What an expression comes to.
    pub(crate) fn value(&mut self, expression: &str) -> Value {
        let mut result = self.call(
            "Runtime.evaluate",
            json!({ "expression": expression, "returnByValue": true }),
        );
        assert!(result["exceptionDetails"].is_null(), "{expression}: {result:#}");
        result["result"]["value"].take()
    }

    /// A click of the mouse in the middle of what a selector finds.
    pub(crate) fn click(&mut self, selector: &str) {
        let quoted = json!(selector);
        let place = self.value(&format!(
            "(() => {{ const element = document.querySelector({quoted}); \
             element.scrollIntoView({{ block: 'center', inline: 'center' }}); \
             const {{ x, y, width, height }} = element.getBoundingClientRect(); \
             return [x + width / 2, y + height / 2]; }})()"
        ));
        for kind in ["mousePressed", "mouseReleased"] {
            self.call(
                "Input.dispatchMouseEvent",
                json!({ "type": kind, "x": place[0], "y": place[1], "button": "left", "clickCount": 1 }),
            );
        }
    }

    /// A key that is pressed: its name, and what it writes.
    pub(crate) fn press(&mut self, key: &str, text: &str) {
        let code = match key {
            "Tab" => 9,
            "Enter" => 13,
            " " => 32,
            _ => 0,
        };
        for kind in ["keyDown", "keyUp"] {
            let mut event = json!({ "type": kind, "key": key, "windowsVirtualKeyCode": code });
            if kind == "keyDown" && !text.is_empty() {
                event["text"] = json!(text);
            }
            self.call("Input.dispatchKeyEvent", event);
        }
    }

    /// What was fetched beside the page itself, and what was complained about.
    pub(crate) fn complaints(&mut self) -> Vec<String> {
        // Whatever is on its way has come when the next answer has.
        self.value("0");
        let mut complaints = Vec::new();
        let mut documents = 0;
        for message in &self.told {
            let parameters = &message["params"];
            match message["method"].as_str().unwrap_or_default() {
                "Network.requestWillBeSent" if parameters["type"] == "Document" && documents == 0 => documents += 1,
                "Network.requestWillBeSent"
                | "Runtime.exceptionThrown"
                | "Log.entryAdded"
                | "Runtime.consoleAPICalled" => {
                    complaints.push(message.to_string());
                }
                _ => {}
            }
        }
        assert_eq!(documents, 1, "the page itself is seen");
        complaints
    }

    /// The whole page as a picture, if MSRGATE_SCREENSHOTS names a folder for it.
    pub(crate) fn picture(&mut self, name: &str) {
        let Some(folder) = std::env::var_os("MSRGATE_SCREENSHOTS") else {
            return;
        };
        let taken = self.call("Page.captureScreenshot", json!({ "captureBeyondViewport": true }));
        let picture = BASE64_STANDARD
            .decode(taken["data"].as_str().expect("a picture"))
            .expect("base64");
        fs::write(Path::new(&folder).join(format!("{name}.png")), picture).expect("a file");
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
