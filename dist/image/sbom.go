package main

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"
	"time"
)

// object is one of JSON: the list is written in the words of SPDX 2.3.
type object map[string]any

// sbom lists what an image is made of: the Go modules that its programs were linked from, and the Debian packages.
func sbom(o options, digest string, l lock, debs []debianPackage, mods []goModule) ([]byte, error) {
	const self = "SPDXRef-Image"
	sum := strings.TrimPrefix(digest, "sha256:")
	image := spdxPackage(self, "overlayd", o.version, "Apache-2.0", "")
	image["primaryPackagePurpose"], image["checksums"] = "CONTAINER", sha256Checksum(sum)
	packages := []object{image}
	relationships := []object{relationship("SPDXRef-DOCUMENT", "DESCRIBES", self)}
	contains := func(p object) {
		packages = append(packages, p)
		relationships = append(relationships, relationship(self, "CONTAINS", p["SPDXID"]))
	}
	for i, p := range l.of(o.arch) { // as many as debs, and in the same order
		contains(debianEntry(l, p, debs[i].licence))
	}
	for _, m := range mods {
		p, err := moduleEntry(m)
		if err != nil {
			return nil, err
		}
		contains(p)
	}
	out, err := json.MarshalIndent(object{
		"spdxVersion": "SPDX-2.3", "dataLicense": "CC0-1.0", "SPDXID": "SPDXRef-DOCUMENT",
		"name":              "overlayd-image-" + string(o.arch),
		"documentNamespace": "https://github.com/overlayd/overlayd/spdx/" + string(o.arch) + "/" + sum,
		"creationInfo": object{
			"created": o.created.UTC().Format(time.RFC3339), "creators": []string{"Tool: overlay-image"},
		},
		"packages": packages, "relationships": relationships,
	}, "", " ")
	return append(out, '\n'), err
}

func spdxPackage(id, name, version, licence, location string) object {
	const noAssertion = "NOASSERTION"
	if location == "" {
		location = noAssertion
	}
	return object{
		"SPDXID": id, "name": name, "versionInfo": version, "downloadLocation": location, "filesAnalyzed": false,
		"licenseConcluded": noAssertion, "licenseDeclared": licence, "copyrightText": noAssertion,
	}
}

func relationship(element, kind string, related any) object {
	return object{"spdxElementId": element, "relationshipType": kind, "relatedSpdxElement": related}
}

func sha256Checksum(sum string) []object {
	return []object{{"algorithm": "SHA256", "checksumValue": sum}}
}

func reference(category, kind, locator string) object {
	return object{"referenceCategory": category, "referenceType": kind, "referenceLocator": locator}
}

func debianEntry(l lock, p pinned, licence string) object {
	urls := l.urls(p)
	out := spdxPackage(spdxID("Debian", p.name), p.name, p.version, licence, urls[len(urls)-1])
	out["checksums"] = sha256Checksum(p.sha256)
	out["externalRefs"] = []object{reference("PACKAGE-MANAGER", "purl", fmt.Sprintf(
		"pkg:deb/debian/%s@%s?arch=%s&distro=debian-%s", p.name, purlEscape(p.version), p.arch, release))}
	return out
}

func moduleEntry(m goModule) (object, error) {
	refs := []object{reference("PACKAGE-MANAGER", "purl", "pkg:golang/"+m.Path+"@"+purlEscape(m.Version))}
	location := "https://go.dev/dl/"
	if m.Path != "stdlib" {
		location = "https://" + m.Path
		sum, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(m.Sum, "h1:"))
		if err != nil || len(sum) != 32 {
			return nil, fmt.Errorf("%s: expected a hash of the module in the program, found %q", m.Path, m.Sum)
		}
		// The hash of go.sum is over the module's files, not over one archive, so it is no checksum.
		refs = append(refs, reference("OTHER", "go-sum-h1", fmt.Sprintf("%x", sum)))
	}
	out := spdxPackage(spdxID("Go", m.Path), m.Path, m.Version, m.licence, location)
	out["externalRefs"] = refs
	return out, nil
}

func spdxID(kind, name string) string {
	clean := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '.' {
			return r
		}
		return '-'
	}, name)
	return "SPDXRef-" + kind + "-" + clean
}

func purlEscape(version string) string {
	return strings.NewReplacer("+", "%2B", ":", "%3A").Replace(version)
}
