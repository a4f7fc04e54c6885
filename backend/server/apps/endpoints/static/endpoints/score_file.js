"use strict";

// The form that scores a file: which columns it has is said before it is sent, and how far it is while it is sent.
// Without this script the same form sends the file, and the server says the same afterwards.
(() => {
    const zone = document.querySelector(".drop-zone");
    const form = zone.closest("form");
    const input = zone.querySelector("input[type=file]");
    const columns = document.querySelector(".columns");
    const algorithm = form.elements["parent_mlalgorithm"];
    const button = document.querySelector("button[name=_save]");
    const upload = form.querySelector(".upload");
    let looks = 0;

    function element(name, text, className = "") {
        const made = document.createElement(name);
        made.textContent = text;
        made.className = className;
        return made;
    }

    function group(title, names, className) {
        const made = element("div", "", className);
        const list = document.createElement("ul");
        list.append(...names.map((name) => element("li", name || "(without a name)")));
        made.append(element("h3", `${title} (${names.length})`, "font-semibold text-important"), list);
        return made;
    }

    function show(found) {
        const parts = found.problem ? [element("p", found.problem, "problem")] : [];
        if (found.recognised) {
            const missing = Object.entries(found.missing).map(([name, near]) => (near ? `${name}: is it ${near}?` : name));
            const groups = [
                ["Missing", missing, "is-missing"],
                ["The model reads", found.recognised, "is-recognised"],
                ["Names the customer", found.identifier === null ? [] : [found.identifier], "is-recognised"],
                ["Ignored", found.ignored, "is-ignored"],
            ];
            parts.push(...groups.filter(([, names]) => names.length).map((told) => group(...told)));
        }
        columns.replaceChildren(...parts);
        button.disabled = Boolean(found.problem);
    }

    async function look() {
        const file = input.files[0];
        looks += 1;
        const mine = looks;
        show({});
        if (!file) {
            return;
        }
        if (file.size > Number(zone.dataset.mostBytes)) {
            show({ problem: zone.dataset.tooLarge });
            return;
        }
        button.disabled = true;
        let found = {};
        try {
            const isParquet = (await file.slice(0, 4).text()) === "PAR1";
            const query = `algorithm=${encodeURIComponent(algorithm.value)}${isParquet ? "&parquet" : ""}`;
            const looked = isParquet
                ? file.slice(-Number(zone.dataset.longestFooter))
                : file.slice(0, Number(zone.dataset.beginning));
            const answer = await fetch(`${zone.dataset.columnsUrl}?${query}`, {
                method: "POST",
                headers: {
                    "Content-Type": "application/octet-stream",
                    "X-CSRFToken": form.elements["csrfmiddlewaretoken"].value,
                },
                body: await looked.arrayBuffer(),
            });
            found = await answer.json();
        } catch {
            // What is wrong with the file is then said when it is sent.
        }
        if (mine === looks) {
            show(found);
        }
    }

    function send(event) {
        event.preventDefault();
        if (button.disabled || !input.files.length) {
            input.focus();
            return;
        }
        const fill = upload.querySelector(".meter-fill");
        const sentence = upload.querySelector(".upload-sentence");
        const request = new XMLHttpRequest();

        function fail(problems) {
            upload.hidden = true;
            show({ problem: problems.join(" ") });
            button.disabled = false;
        }

        request.upload.addEventListener("progress", (sent) => {
            const percent = (100 * sent.loaded) / sent.total;
            fill.style.width = `${percent}%`;
            sentence.textContent = percent < 100 ? `${Math.floor(percent)}% sent.` : "Sent; looking at the header.";
        });
        request.addEventListener("load", () => {
            if (request.response?.url) {
                window.location.assign(request.response.url);
            } else {
                fail(request.response?.problems ?? ["The server did not take the file. Read this page again, then retry."]);
            }
        });
        request.addEventListener("error", () => fail(["The upload broke off; send the file again."]));
        request.open("POST", window.location.pathname);
        request.responseType = "json";
        request.setRequestHeader("X-Requested-With", "XMLHttpRequest");
        request.send(new FormData(form));
        button.disabled = true;
        upload.hidden = false;
        sentence.textContent = "0% sent.";
    }

    zone.querySelector(".drop-zone-hint").hidden = false;
    for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
        zone.addEventListener(name, (event) => {
            event.preventDefault();
            zone.classList.toggle("is-over", name === "dragenter" || name === "dragover");
        });
    }
    zone.addEventListener("drop", (event) => {
        if (event.dataTransfer.files.length) {
            input.files = event.dataTransfer.files;
            look();
        }
    });
    input.addEventListener("change", look);
    algorithm.addEventListener("change", look);
    form.addEventListener("submit", send);
    look();
})();
