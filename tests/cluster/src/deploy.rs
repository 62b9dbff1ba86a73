//! Applies `deploy/manifests.yaml` to the API server and holds its permissions to what is asked for.
//!
//! Objects are sent with strict validation, so a misspelt field is refused. The permissions are those that the API server
//! itself lists for the ServiceAccount's token, compared as a whole: one too many fails as one too few does.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::api::{Api, Identity};
use crate::control_plane::ControlPlane;
use crate::report::Report;

/// Applies the manifests and checks permissions.
pub fn run(plane: &ControlPlane, root: &Path, report: &mut Report) -> Result<()> {
    let objects = read(root)?;
    let mut admin = plane.client(Identity::Administrator)?;
    for object in &objects {
        let kind = object["kind"].as_str().context("an object has a kind")?;
        let path = format!("{}?fieldValidation=Strict", collection(kind)?);
        let outcome = admin.create(&path, object).map(drop);
        report.check(
            &format!("deploy/manifests.yaml: {kind} is applied"),
            outcome,
        );
    }
    let token = account_token(&mut admin, "sluice", &Value::Null)?;
    report.check(
        "its ServiceAccount may do what sluice does and nothing more",
        permissions(plane, &token),
    );
    report.check(
        "its ServiceAccount is refused what it must not do",
        refusals(plane, &token),
    );
    Ok(())
}

/// A token of the ServiceAccount that is good as long as the Secret of this name, which is made for it, is there.
pub fn bound_token(admin: &mut Api, secret: &str) -> Result<String> {
    let object = json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": secret, "namespace": "kube-system"},
    });
    let made = admin.create(SECRETS, &object)?;
    let bound = json!({"kind": "Secret", "apiVersion": "v1", "name": secret, "uid": made["metadata"]["uid"]});
    account_token(admin, "sluice", &bound)
}

/// Ends the tokens that are bound to a Secret.
pub fn revoke(admin: &mut Api, secret: &str) -> Result<()> {
    admin
        .call("DELETE", &format!("{SECRETS}/{secret}"), None)
        .map(drop)
}

/// The capabilities of the DaemonSet's container, as `setpriv --bounding-set` takes them.
pub fn capabilities(root: &Path) -> Result<String> {
    let objects = read(root)?;
    let set = objects
        .iter()
        .find(|object| object["kind"] == "DaemonSet")
        .context("a DaemonSet")?;
    let container = &set["spec"]["template"]["spec"]["containers"][0];
    let list = container["securityContext"]["capabilities"]["add"]
        .as_array()
        .context("capabilities")?;
    let names = list
        .iter()
        .filter_map(Value::as_str)
        .map(|name| format!(",+{}", name.to_lowercase()));
    Ok(format!("-all{}", names.collect::<String>()))
}

/// The text of a key of the ConfigMap.
pub fn config_map(root: &Path, key: &str) -> Result<String> {
    let objects = read(root)?;
    let map = objects
        .iter()
        .find(|object| object["kind"] == "ConfigMap")
        .context("a ConfigMap")?;
    let text = map["data"][key]
        .as_str()
        .with_context(|| format!("no key {key}"))?;
    Ok(text.to_owned())
}

fn read(root: &Path) -> Result<Vec<Value>> {
    let path = root.join("deploy/manifests.yaml");
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    serde_saphyr::from_multiple(&text).with_context(|| format!("parse {}", path.display()))
}

fn permissions(plane: &ControlPlane, token: &str) -> Result<()> {
    let mut admin = plane.client(Identity::Administrator)?;
    let nobody = json!({
        "apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "nobody", "namespace": "kube-system"},
    });
    admin.create(collection("ServiceAccount")?, &nobody)?;
    let everybodys = granted(plane, &account_token(&mut admin, "nobody", &Value::Null)?)?;
    let found: BTreeSet<String> = granted(plane, token)?
        .difference(&everybodys)
        .cloned()
        .collect();
    let wanted: BTreeSet<String> = PERMISSIONS.iter().map(ToString::to_string).collect();
    let surplus: Vec<_> = found.difference(&wanted).collect();
    let lacking: Vec<_> = wanted.difference(&found).collect();
    ensure!(
        surplus.is_empty() && lacking.is_empty(),
        "too many: {surplus:?}, too few: {lacking:?}"
    );
    Ok(())
}

fn account_token(admin: &mut Api, account: &str, bound: &Value) -> Result<String> {
    let request = json!({
        "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 7200, "boundObjectRef": bound},
    });
    let path = format!("/api/v1/namespaces/kube-system/serviceaccounts/{account}/token");
    let answer = admin.create(&path, &request)?;
    let token = answer["status"]["token"].as_str().context("a token")?;
    Ok(token.to_owned())
}

/// What the API server says that the bearer of a token may do.
fn granted(plane: &ControlPlane, token: &str) -> Result<BTreeSet<String>> {
    let mut account = plane.client(Identity::Token(token.to_owned()))?;
    let review = json!({
        "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectRulesReview", "spec": {"namespace": "default"},
    });
    let answer = account.create(
        "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews",
        &review,
    )?;
    let words = |list: &Value| -> Vec<String> {
        let list = list.as_array().into_iter().flatten();
        list.filter_map(|word| word.as_str().map(str::to_owned))
            .collect()
    };
    let mut found = BTreeSet::new();
    for rule in answer["status"]["resourceRules"]
        .as_array()
        .context("rules")?
    {
        for group in words(&rule["apiGroups"]) {
            for resource in words(&rule["resources"]) {
                found.extend(
                    words(&rule["verbs"])
                        .iter()
                        .map(|verb| format!("{verb} {resource}.{group}")),
                );
            }
        }
    }
    Ok(found)
}

fn refusals(plane: &ControlPlane, token: &str) -> Result<()> {
    let mut account = plane.client(Identity::Token(token.to_owned()))?;
    for (method, path, wanted) in [
        ("GET", "/api/v1/services", 200),
        ("GET", "/apis/discovery.k8s.io/v1/endpointslices", 200),
        ("GET", "/api/v1/nodes", 200),
        ("GET", "/api/v1/pods", 403),
        ("GET", "/api/v1/secrets", 403),
        (
            "GET",
            "/api/v1/namespaces/kube-system/configmaps/sluice",
            403,
        ),
        (
            "DELETE",
            "/api/v1/namespaces/default/services/kubernetes",
            403,
        ),
        ("PATCH", "/api/v1/nodes/n1", 403),
    ] {
        let body = (method == "PATCH").then(|| json!({"metadata": {"labels": {"x": "y"}}}));
        let answer = account.send(method, path, body.as_ref())?;
        ensure!(
            answer.status == wanted,
            "{method} {path}: {} instead of {wanted}",
            answer.status
        );
    }
    Ok(())
}

fn collection(kind: &str) -> Result<&'static str> {
    match kind {
        "ServiceAccount" => Ok("/api/v1/namespaces/kube-system/serviceaccounts"),
        "ConfigMap" => Ok("/api/v1/namespaces/kube-system/configmaps"),
        "ClusterRoleBinding" => Ok("/apis/rbac.authorization.k8s.io/v1/clusterrolebindings"),
        "DaemonSet" => Ok("/apis/apps/v1/namespaces/kube-system/daemonsets"),
        other => anyhow::bail!("a kind that is not expected in deploy/manifests.yaml: {other}"),
    }
}

const SECRETS: &str = "/api/v1/namespaces/kube-system/secrets";
/// Those of system:node-proxier, which have Events in them.
const PERMISSIONS: [&str; 17] = [
    "list services.",
    "watch services.",
    "list endpoints.",
    "watch endpoints.",
    "get nodes.",
    "list nodes.",
    "watch nodes.",
    "list endpointslices.discovery.k8s.io",
    "watch endpointslices.discovery.k8s.io",
    "list servicecidrs.networking.k8s.io",
    "watch servicecidrs.networking.k8s.io",
    "create events.",
    "patch events.",
    "update events.",
    "create events.events.k8s.io",
    "patch events.events.k8s.io",
    "update events.events.k8s.io",
];
